"""Where the causal LM comes from: a Hugging Face name, a local folder, or the language part of a multimodal one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from genrec.errors import ConfigError

log = logging.getLogger(__name__)

# Text parts without a causal LM of their own, and the plain architecture that computes the same on text alone:
# with equal positions on all three axes, multimodal rotary embedding is the ordinary one.
TEXT_TWINS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def is_multimodal(base: str, trust_remote_code: bool = False) -> bool:
    """Whether the checkpoint holds more than a language model."""
    config = _config(base, trust_remote_code)
    return config.get_text_config() is not config


def _config(base: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"backbone.base {base!r}: no model there ({str(err).splitlines()[0]}); "
            "give a Hugging Face name, a folder with config.json, or scratch:"
        ) from err


def extract_language_part(base: str, folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Save the language part of a multimodal checkpoint as a plain causal LM folder.

    Args:
        base: name or path of the multimodal checkpoint.
        folder: where `from_pretrained` will find the causal LM and its tokenizer.
        trust_remote_code: run the code inside the base's repository.

    Returns:
        {"model_type", "parameters"}.

    Raises:
        ConfigError: the language part has no causal LM in transformers, or weights are missing.
    """
    config = _config(base, trust_remote_code)
    text = config.get_text_config()
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype="auto", trust_remote_code=trust_remote_code)
    settings = text.to_dict()
    settings.pop("architectures", None)
    model_type = TEXT_TWINS.get(settings.pop("model_type"), text.model_type)
    if model_type != text.model_type:
        rope = dict(settings.pop("rope_scaling", None) or settings.pop("rope_parameters", None) or {})
        settings.pop("rope_parameters", None)
        theta = rope.get("rope_theta", settings.get("rope_theta", 10_000.0))
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    # the outer and the inner config may disagree: the weights know
    settings["tie_word_embeddings"] = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    try:
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    except ValueError as err:
        raise ConfigError(
            f"backbone.base {base!r}: its language part is a {text.model_type}, which transformers has no causal LM "
            "for; use a text-only checkpoint of the same family"
        ) from err
    plain.to(whole.dtype)
    state = {f"model.{k}": v for k, v in whole.get_decoder().state_dict().items()}
    state["lm_head.weight"] = whole.get_output_embeddings().weight
    missing, unexpected = plain.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ConfigError(
            f"backbone.base {base!r}: language part does not fit {model_type}: missing {list(missing)[:3]}, "
            f"unexpected {list(unexpected)[:3]}; use a text-only checkpoint of the same family"
        )
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code).save_pretrained(folder)
    return {"model_type": model_type, "parameters": sum(p.numel() for p in plain.parameters())}


def load_base(base: str, load_in: str = "float32", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A causal LM and its fast tokenizer.

    Args:
        base: Hugging Face name or folder of a plain causal LM.
        load_in: "float32", "bfloat16", or "int8" / "nf4" through bitsandbytes (QLoRA, Dettmers et al. 2023).
        trust_remote_code: run the code inside the base's repository.

    Raises:
        ConfigError: no model there, no fast tokenizer, or logits that are not a plain matrix product.
    """
    config = _config(base, trust_remote_code)
    for name in UNSUPPORTED:
        if getattr(config, name, None) not in (None, 1.0):
            raise ConfigError(
                f"backbone.base {base!r}: config.{name} = {getattr(config, name)}; scores over semantic ids need "
                "plain logits, so use a base without it (Qwen, Llama, Mistral, SmolLM, ...)"
            )
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if load_in in ("int8", "nf4"):
        from transformers import BitsAndBytesConfig

        compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        arguments["dtype"] = compute
        arguments["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if load_in == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
            )
        )
    else:
        arguments["dtype"] = getattr(torch, load_in)
    model = AutoModelForCausalLM.from_pretrained(base, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"backbone.base {base!r}: no fast tokenizer; convert it with transformers first")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"backbone.base {base!r}: its tokenizer names no end token; set eos_token in its config")
    return model, tokenizer
