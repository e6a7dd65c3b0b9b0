"""Backbone: splice, losses, packing, merging - against plain transformers and plain loops."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from genrec.adapters import build_adapter
from genrec.backbone import Backbone, collate_prompts
from genrec.encoders.features import Features
from genrec.errors import DataError
from genrec.prompts import Layout, Prompter
from genrec.scratch import train_tokenizer
from genrec.training.packing import PackedCollator, blank_row, packed_rows

N = 10
TEXTS = ["Blue mug of Brightwell\nmaterial: steel", "Red lamp\nmaterial: oak"] * 4
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


def make(arch="qwen3", tied=True, lora=True, tune_base=False, seed=0, known=None):
    tokenizer = train_tokenizer(TEXTS, 400)
    torch.manual_seed(seed)
    config, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[arch]
    lm = model(config(vocab_size=len(tokenizer), tie_word_embeddings=tied, **SHAPE))
    layout = Layout(
        len(tokenizer), 3, 4, soft_tokens=2, soft_prompt=3, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id
    )
    rng = np.random.default_rng(seed)
    features = {
        "text": Features(values=rng.normal(size=(N, 1, 6)).astype(np.float32), present=np.ones(N, bool)),
        "image": Features(values=rng.normal(size=(N, 4, 5)).astype(np.float32), present=np.arange(N) != 3),
    }
    adapter = build_adapter("qformer", {"text": 6, "image": 5}, 2, 32, rms=0.02, width=8)
    codes = np.stack(np.unravel_index(rng.permutation(64)[:N], (4, 4, 4)), 1).astype(np.int32)
    backbone = Backbone(
        lm,
        layout,
        adapter,
        features,
        codes,
        np.ones(N, bool) if known is None else known,
        lora={"r": 4, "alpha": 8, "dropout": 0.0} if lora else None,
        tune_base=tune_base,
    )
    return backbone.eval(), Prompter(tokenizer, layout, codes)


def batch_of(prompts, layout, row_tokens=256):
    return PackedCollator(layout)([row for p in prompts for row in packed_rows([p], row_tokens)])


HISTORIES = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [0, 3]]


@pytest.fixture(params=[("qwen3", True), ("llama", False)], ids=["qwen3-tied", "llama-untied"])
def pair(request):
    return make(*request.param)


def test_packed_equals_padded(pair):
    backbone, prompter = pair
    prompts = [prompter.next_item(h) for h in HISTORIES] + [prompter.item_text(2, "Red lamp")]
    padded = batch_of(prompts, prompter.layout)
    packed = PackedCollator(prompter.layout)(packed_rows(prompts, 64))
    assert len(packed["input_ids"]) < len(prompts)
    with torch.inference_mode():
        a, b = backbone(**padded)["loss"], backbone(**packed)["loss"]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    broken = dict(packed, segments=packed["segments"].clamp(max=0))  # the control: one segment leaks
    with torch.inference_mode():
        assert (backbone(**broken)["loss"] - a).abs() > 1e-4


def test_loss_equals_a_plain_loop(pair):
    backbone, prompter = pair
    layout = prompter.layout
    prompt = prompter.next_item([1, 2])
    ids, slots, _ = collate_prompts([prompt], layout, torch.device("cpu"))
    with torch.inference_mode():
        vectors = backbone.embed(ids, slots)
        hidden = backbone.decoder(inputs_embeds=vectors).last_hidden_state[0]
        losses = []
        for t in np.flatnonzero(prompt.targets):
            level, code = divmod(int(prompt.input_ids[t]) - layout.sid_start, layout.n_codes)
            rows = backbone.sid_out[level * 4 : level * 4 + 4]
            prefix = prompt.input_ids[t - level : t]
            legal = sorted({int(s[level]) for s in prompter.sids if (s[:level] == prefix).all()})
            legal = [s - layout.sid_start - level * layout.n_codes for s in legal]
            losses.append(-F.log_softmax((rows @ hidden[t - 1])[legal], 0)[legal.index(code)])
        loss = backbone(**batch_of([prompt], layout))["loss"]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_text_targets_compete_with_the_whole_vocabulary(pair):
    backbone, prompter = pair
    prompt = prompter.item_text(2, "Red lamp")
    ids, slots, _ = collate_prompts([prompt], prompter.layout, torch.device("cpu"))
    with torch.inference_mode():
        hidden = backbone.decoder(inputs_embeds=backbone.embed(ids, slots)).last_hidden_state[0]
        head = torch.cat([backbone.base.get_output_embeddings().weight, backbone.sid_out])
        at = np.flatnonzero(prompt.targets)
        expected = F.cross_entropy(hidden[at - 1] @ head.T, ids[0, at])
        loss = backbone(**batch_of([prompt], prompter.layout))["loss"]
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_soft_tokens_land_in_their_slots(pair):
    backbone, prompter = pair
    prompts = [prompter.next_item([1, 2, 1]), prompter.next_item([3])]
    ids, slots, _ = collate_prompts(prompts, prompter.layout, torch.device("cpu"))
    with torch.inference_mode():
        vectors = backbone.embed(ids, slots)
        soft = backbone.soft_tokens(torch.arange(N))
    for row, prompt in enumerate(prompts):
        for t, slot in enumerate(prompt.slots):
            if slot >= 0:
                torch.testing.assert_close(vectors[row, t], soft[slot // 2, slot % 2])
            elif slot < -1:
                torch.testing.assert_close(vectors[row, t], backbone.soft_prompt[-2 - slot])


def test_one_slot_too_few_names_the_sequence_and_both_counts(pair):
    backbone, prompter = pair
    prompts = [prompter.next_item([1, 2]), prompter.next_item([4, 5])]
    ids, slots, _ = collate_prompts(prompts, prompter.layout, torch.device("cpu"))
    # one too few in row 0 and one too many in row 1: the batch's totals agree, the sequences' do not
    moved = slots.clone()
    moved[0, (slots[0] >= 0).nonzero()[0]] = -1
    moved[1, (slots[1] == -1).nonzero()[-1]] = 0
    assert (moved != -1).sum() == (slots != -1).sum()
    with pytest.raises(DataError, match="sequence 0: 7 placeholder tokens, but vectors for 6 slots"):
        backbone.embed(ids, moved)


def test_only_what_should_train_gets_a_gradient(pair):
    backbone, prompter = pair
    backbone.train()
    backbone(**batch_of([prompter.next_item(h) for h in HISTORIES], prompter.layout))["loss"].backward()
    with_gradient = {n for n, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().any()}
    assert {"sid_in", "soft_prompt"} <= with_gradient
    assert any(n.startswith("adapter.") for n in with_gradient)
    assert any("lora_B" in n for n in with_gradient)
    assert not any("base_layer" in n or "embed_tokens" in n or "lm_head" in n for n in with_gradient)


def test_trained_state_restores_exactly(pair):
    backbone, prompter = pair
    with torch.no_grad():
        for p in backbone.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    state = backbone.trained_state()
    assert not any("base_layer" in k or "embed_tokens" in k for k in state)
    arch, tied = ("llama", False) if backbone.sid_out_rows is not None else ("qwen3", True)
    fresh, _ = make(arch, tied)
    batch = batch_of([prompter.next_item(h) for h in HISTORIES], prompter.layout)
    with torch.inference_mode():
        assert not torch.equal(fresh(**batch)["loss"], backbone(**batch)["loss"])
        fresh.load_trained(state)
        assert torch.equal(fresh(**batch)["loss"], backbone(**batch)["loss"])


def test_state_of_another_model_is_refused(pair):
    backbone, _ = pair
    with pytest.raises(DataError, match="sid_in"):
        backbone.load_trained({"sid_in": torch.zeros(1, 1)})


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(("arch", "tied"), [("qwen3", True), ("llama", False)])
def test_merged_equals_separate(arch, tied, tune):
    backbone, prompter = make(arch, tied, lora=tune == "lora", tune_base=tune == "full")
    with torch.no_grad():
        for p in backbone.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    layout = prompter.layout
    ids, slots, _ = collate_prompts([prompter.next_item([1, 2, 3])], layout, torch.device("cpu"))
    with torch.inference_mode():
        vectors = backbone.embed(ids, slots)
        hidden = backbone.decoder(inputs_embeds=vectors).last_hidden_state
        expected = [backbone.sid_logits(level, hidden) for level in range(3)]
    lm = backbone.merged()
    assert lm.get_input_embeddings().weight.shape[0] >= layout.size
    with torch.inference_mode():
        plain = (slots == -1)[0]
        torch.testing.assert_close(lm.get_input_embeddings()(ids)[0][plain], vectors[0][plain])
        logits = lm(inputs_embeds=vectors).logits
    for level in range(3):
        start = layout.sid_start + level * 4
        torch.testing.assert_close(logits[..., start : start + 4], expected[level], atol=1e-4, rtol=1e-4)


def test_blank_rows_change_neither_loss_nor_gradient(pair):
    backbone, prompter = pair
    rows = packed_rows([prompter.next_item(h) for h in HISTORIES], 64)
    collator = PackedCollator(prompter.layout)
    losses = []
    for more in ([], [blank_row(prompter.layout)] * 3):
        backbone.zero_grad()
        loss = backbone(**collator(rows + more))["loss"]
        loss.backward()
        losses.append((loss.detach(), backbone.sid_in.grad.clone()))
    torch.testing.assert_close(losses[0], losses[1])
    backbone.zero_grad()
    backbone(**collator([blank_row(prompter.layout)] * 2))["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in backbone.parameters())


def test_training_does_not_push_new_items_down():
    """The loss over known items equals that of a catalogue without the new ones, and decoding still reaches those."""
    known = np.arange(N) < 7
    some, prompter = make(known=known)
    every, _ = make()
    batch = batch_of([prompter.next_item([1, 2, 3])], prompter.layout)
    with torch.inference_mode():
        assert some(**batch)["loss"] < every(**batch)["loss"]
    assert some.known_trie.n_items == 7
    assert some.trie.n_items == N
