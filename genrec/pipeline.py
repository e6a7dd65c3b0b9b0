"""A run from a recipe: every stage in order, each skipped when nothing it depends on changed."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from genrec.artefacts import MANIFEST, file_hash, key_at, key_of, read_manifest, run_stage, write_text
from genrec.catalog import Catalogue
from genrec.config import Recipe, load_recipe
from genrec.errors import ArtefactError
from genrec.variants import VARIANTS
from genrec.workspace import Workspace

log = logging.getLogger(__name__)
CATALOGUE_SETTINGS = {"item_columns", "max_bad_share", "max_text_chars", "max_pixels"}  # of data
LOG_SETTINGS = {
    *("interaction_columns", "max_bad_share", "split", "cold_share", "test_share", "max_history", "max_users"),
}


def pictures_hash(catalogue: Catalogue) -> str:
    """A hash over the bytes of every item's picture, so that a replaced or lost one is noticed."""
    return key_of([p and (file_hash(Path(p)) if Path(p).is_file() else "missing") for p in catalogue.images])


@dataclass(frozen=True)
class Run:
    """One run's folder and recipe; `shared` is the parent's folder in a variant."""

    folder: Path
    recipe: Recipe
    shared: Path
    force: bool = False

    @classmethod
    def create(cls, recipe: Recipe, runs: Path, force: bool = False) -> Run:
        """The run of a recipe under `runs`; saves the resolved recipe beside it."""
        folder = runs / recipe.name
        write_text(folder / "recipe.yaml", yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False))
        return cls(folder, recipe, folder, force)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """A run that `create` made; raises ArtefactError when there is none."""
        if not (folder / "recipe.yaml").is_file():
            raise ArtefactError(f"{folder}: no recipe.yaml there, so no run; start one with genrec run RECIPE.yaml")
        return cls(folder, load_recipe(folder / "recipe.yaml"), folder)

    def variant(self, name: str) -> Run:
        """The same run without one of its parts, on the same data."""
        return Run(self.folder / "ablations" / name, VARIANTS[name](self.recipe), self.folder, self.force)

    @cached_property
    def space(self) -> Workspace:
        return Workspace(self.recipe, self.folder, self.shared)

    def _settings(self, *names: str) -> dict[str, Any]:
        dump = json.loads(self.recipe.model_dump_json())
        return {"seed": dump["seed"], **{name: dump[name] for name in names}}

    # -- stages ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """catalog/ and interactions/: read, checked, split."""
        from genrec.catalog import read_catalogue
        from genrec.interactions import read_log
        from genrec.splits import split_log

        data = self.recipe.data
        items, interactions = data.items, data.interactions
        synthetic = data.synthetic
        if synthetic is not None:
            from genrec.synthetic import make_synthetic

            def build_source(out: Path) -> dict[str, Any]:
                make_synthetic(synthetic, self.recipe.seed, out)
                return synthetic.model_dump()

            made_with = {"seed": self.recipe.seed, **synthetic.model_dump()}
            source = run_stage(self.folder, "source", made_with, {}, build_source, self.force)
            items, interactions = source / "items.jsonl", source / "interactions.parquet"
        assert items is not None
        assert interactions is not None

        def build_catalogue(out: Path) -> dict[str, Any]:
            catalogue, quarantine = read_catalogue(
                items,
                data.item_columns,
                max_bad_share=data.max_bad_share,
                max_text_chars=data.max_text_chars,
                max_pixels=data.max_pixels,
            )
            catalogue.save(out)
            quarantine.save(out)
            return {
                "items": len(catalogue.item_ids),
                "pictures": sum(i is not None for i in catalogue.images),
                "pictures_sha256": pictures_hash(catalogue),
                "folder": str(items.resolve().parent),
            }

        folder = run_stage(
            self.folder,
            "catalog",
            data.model_dump(include=CATALOGUE_SETTINGS),
            {"items": file_hash(items)},
            build_catalogue,
            self.force or self._pictures_changed(items.resolve().parent),
        )

        def build_split(out: Path) -> dict[str, Any]:
            catalogue = self.space.catalogue
            events, quarantine = read_log(
                interactions, data.interaction_columns, catalogue, max_bad_share=data.max_bad_share
            )
            split = split_log(
                events,
                len(catalogue.item_ids),
                data.split,
                seed=self.recipe.seed,
                max_history=data.max_history,
                cold_share=data.cold_share,
                test_share=data.test_share,
                max_users=data.max_users,
            )
            events.save(out)
            split.save(out)
            quarantine.save(out)
            return {
                "users": len(events.user_ids),
                "events": len(events.items),
                "test_users": len(split.test.targets),
            }

        inputs = {"log": file_hash(interactions), "catalog": key_at(folder)}
        settings = {"seed": self.recipe.seed, **data.model_dump(include=LOG_SETTINGS)}
        run_stage(self.folder, "interactions", settings, inputs, build_split, self.force)

    def _pictures_changed(self, source: Path) -> bool:
        """Whether the pictures that the catalogue stage found are no longer those in the source's folder."""
        folder = self.folder / "catalog"
        if not (folder / MANIFEST).is_file():
            return False
        found = read_manifest(folder)["result"]
        if found.get("folder") == str(source) and found.get("pictures_sha256") == pictures_hash(Catalogue.load(folder)):
            return False
        log.info("catalog: pictures changed")
        return True

    def encode(self) -> None:
        """features/text and features/image."""
        from genrec.encoders import encode

        for modality in ("text", "image"):
            settings = getattr(self.recipe.encode, modality)
            if settings is None:
                continue

            def build(out: Path, modality: str = modality, settings: Any = settings) -> dict[str, Any]:
                features = encode(self.space.catalogue, modality, settings, self.folder / ".cache" / modality)
                features.save(out)
                return {"shape": list(features.values.shape), "present": int(features.present.sum())}

            inputs = {"catalog": key_at(self.folder / "catalog")}
            if modality == "image" and settings.kind != "precomputed":
                inputs["pictures"] = read_manifest(self.folder / "catalog")["result"]["pictures_sha256"]
            if settings.path is not None:
                inputs["path"] = file_hash(settings.path)
            run_stage(
                self.folder,
                f"features/{modality}",
                json.loads(settings.model_dump_json()),
                inputs,
                build,
                self.force,
            )

    def _feature_keys(self) -> dict[str, str]:
        return {m: key_at(self.shared / "features" / m) for m in self.space.features}

    def semantic_ids(self) -> None:
        """semantic_ids/: codes fitted on items seen in training; the others through the frozen codebooks."""
        from genrec.semantic_ids import fit_semantic_ids

        def build(out: Path) -> dict[str, Any]:
            settings, split = self.recipe.semantic_ids, self.space.split
            wanted = settings.modalities
            ids = fit_semantic_ids(
                {m: features for m, features in self.space.features.items() if wanted is None or m in wanted},
                method=settings.method,
                levels=settings.levels,
                codes=settings.codes,
                seed=self.recipe.seed,
                histories=split.train,
                collaborative_dim=settings.collaborative_dim,
                collaborative_weight=settings.collaborative_weight,
                fit_on=~split.cold,
            )
            ids.save(out)
            return ids.report

        inputs = {**self._feature_keys(), "interactions": key_at(self.shared / "interactions")}
        run_stage(self.folder, "semantic_ids", self._settings("semantic_ids"), inputs, build, self.force)

    def base(self) -> None:
        """base/: the scratch LM, the language part of a multimodal base, or a note where the base is."""
        from genrec.bases import extract_language_part, is_multimodal
        from genrec.scratch import make_scratch
        from genrec.training.texts import exercises

        backbone, mixture = self.recipe.backbone, self.recipe.finetune.mixture.model_dump()
        scratch = backbone.base.startswith("scratch:")
        taught = scratch and any(mixture.values())

        def build(out: Path) -> dict[str, Any]:
            if scratch:
                shape = backbone.scratch.model_dump()
                texts, seed = self.space.catalogue.texts(), self.recipe.seed
                return {"path": None, **make_scratch(texts, out, exercises=exercises(self.space), seed=seed, **shape)}
            if is_multimodal(backbone.base, backbone.trust_remote_code):
                return {"path": None, **extract_language_part(backbone.base, out, backbone.trust_remote_code)}
            return {"path": backbone.base}

        settings = {
            "base": backbone.base,
            **({"scratch": backbone.scratch.model_dump(), "seed": self.recipe.seed} if scratch else {}),
            **({"mixture": mixture, "looks": self.recipe.data.looks} if taught else {}),
        }
        inputs = {"catalog": key_at(self.shared / "catalog")} if scratch else {}
        if taught:
            inputs |= {"interactions": key_at(self.shared / "interactions"), **self._feature_keys()}
        config = Path(backbone.base) / "config.json"
        if not scratch and config.is_file():
            inputs["config"] = file_hash(config)
        run_stage(self.folder, "base", settings, inputs, build, self.force)

    def align(self) -> None:
        """alignment/: the adapter against the LLM; skipped with no soft tokens or no steps."""
        if self.recipe.align.steps == 0 or self.recipe.backbone.soft_tokens == 0:
            shutil.rmtree(self.folder / "alignment", ignore_errors=True)  # of an earlier recipe
            return
        from genrec.training.align import align

        settings = {**self._settings("align", "adapter", "backbone"), "looks": self.recipe.data.looks}
        run_stage(
            self.folder, "alignment", settings,
            {**self._feature_keys(), "base": key_at(self.space.base_folder), "catalog": key_at(self.shared / "catalog"),
             "semantic_ids": key_at(self.folder / "semantic_ids")},
            lambda out: align(self.space, out), self.force,
        )  # fmt: skip

    def finetune(self, force: bool = False) -> None:
        """lora/: the tuned weights; under accelerate launch every process trains and the first one writes."""
        import torch
        from accelerate import PartialState

        from genrec.training.finetune import finetune, save_finetuned

        inputs = {
            **self._feature_keys(),
            "interactions": key_at(self.shared / "interactions"),
            "semantic_ids": key_at(self.folder / "semantic_ids"),
            "base": key_at(self.space.base_folder),
        }
        if (self.folder / "alignment" / MANIFEST).is_file():
            inputs["alignment"] = key_at(self.folder / "alignment")
        settings = self._settings("finetune", "adapter", "backbone")
        settings |= {"exclude_seen": self.recipe.data.exclude_seen, "looks": self.recipe.data.looks}
        checkpoints = self.folder / ".checkpoints" / key_of({"settings": settings, "inputs": inputs})[:16]
        force = force or self.force
        if force:
            shutil.rmtree(checkpoints, ignore_errors=True)
        state = PartialState(cpu=not torch.cuda.is_available())  # else processes on CPUs do not see each other
        if not state.is_main_process:
            target = self.folder / "lora" / MANIFEST
            stage_key = key_of({"stage": "lora", "settings": settings, "inputs": inputs})
            done = not force and target.is_file() and key_at(self.folder / "lora") == stage_key
            state.wait_for_everyone()
            if not done:
                finetune(self.space, checkpoints)
            return
        state.wait_for_everyone()
        run_stage(
            self.folder, "lora", settings, inputs,
            lambda out: save_finetuned(*finetune(self.space, checkpoints), out), force,
        )  # fmt: skip
        shutil.rmtree(self.folder / ".checkpoints", ignore_errors=True)

    def sequence(self) -> None:
        """sequence/: a self-attentive ranker and how much it counts; skipped where the recipe wants none."""
        if self.recipe.sequence.epochs == 0:
            shutil.rmtree(self.folder / "sequence", ignore_errors=True)  # of an earlier recipe
            return
        from genrec.training.sequence import fit_sequence

        settings = {**self._settings("sequence"), "exclude_seen": self.recipe.data.exclude_seen}
        inputs = {
            **self._feature_keys(),
            "interactions": key_at(self.shared / "interactions"),
            "lora": key_at(self.folder / "lora"),
        }
        run_stage(
            self.folder, "sequence", settings, inputs, lambda out: fit_sequence(self.space, out), self.force
        )  # fmt: skip

    def mix(self) -> None:
        """mix/: what orders the lists; skipped where the recipe wants none."""
        if self.recipe.mix.users == 0:
            shutil.rmtree(self.folder / "mix", ignore_errors=True)  # of an earlier recipe
            return
        from genrec.training.mix import fit_mixer

        recipe = self.recipe
        settings = self._settings("mix")
        settings |= {"relatives": recipe.new_items.relatives, "content": bool(recipe.backbone.profile)}
        settings |= {"exclude_seen": recipe.data.exclude_seen, "beams": recipe.evaluate.beams}
        inputs = {
            **self._feature_keys(),
            **self.scoring_keys(),
            "catalog": key_at(self.shared / "catalog"),
            "interactions": key_at(self.shared / "interactions"),
        }
        run_stage(self.folder, "mix", settings, inputs, lambda out: fit_mixer(self.space, out), self.force)

    def train(self) -> None:
        """What a variant does again: from semantic ids to the mixer, and the base where it wants another."""
        if self.recipe.backbone.scratch != load_recipe(self.shared / "recipe.yaml").backbone.scratch:
            self.base()
        self.semantic_ids()
        self.align()
        self.finetune()
        self.sequence()
        self.mix()

    def through_training(self) -> None:
        """Every stage up to the tuned generator."""
        self.prepare()
        self.encode()
        self.base()
        self.train()
        if self.recipe.serve.rerank is None:
            shutil.rmtree(self.folder / "reranker", ignore_errors=True)  # of an earlier recipe
        else:
            from genrec.system_run import train_reranker

            train_reranker(self)

    def tuned_keys(self) -> dict[str, str]:
        """Of the stages that the tuned generator and its lists consist of."""
        return self.scoring_keys() | ({"mix": key_at(self.folder / "mix")} if self.recipe.mix.users else {})

    def scoring_keys(self) -> dict[str, str]:
        """The same without the mixer."""
        stages = ("lora", "sequence") if self.recipe.sequence.epochs else ("lora",)
        return {stage: key_at(self.folder / stage) for stage in stages}

    def rank_test(self, reranked: bool = False) -> Path:
        """ranking/ or reranked/: the top 50 for every test case, int32 [n, 50], in top.npy; returns the folder."""
        from genrec.ranking import rank_cases

        recipe = self.recipe

        def build(out: Path) -> None:
            space = self.space
            backbone = space.tuned_backbone()
            top = rank_cases(
                backbone,
                space.prompter,
                space.split.test,
                available=space.catalogue.available,
                exclude_seen=recipe.data.exclude_seen,
                beams=recipe.evaluate.beams,
                newcomers=None if space.newcomers is None else space.newcomers.to(backbone.device),
                mixer=None if space.mixer is None else space.mixer.to(backbone.device),
                reranker=space.reranker if reranked else None,
            )
            np.save(out / "top.npy", top)

        settings = {"exclude_seen": recipe.data.exclude_seen, "beams": recipe.evaluate.beams}
        settings |= self._settings("new_items")
        inputs = {**self.tuned_keys(), "interactions": key_at(self.shared / "interactions")}
        if reranked:
            inputs["reranker"] = key_at(self.folder / "reranker")
        return run_stage(self.folder, "reranked" if reranked else "ranking", settings, inputs, build, self.force)

    def export(self) -> Path:
        """export/: merged weights and everything that serving needs."""
        from genrec.encoders.frozen import FrozenEncoder
        from genrec.serving.export import write_export
        from genrec.serving.intake import Intake
        from genrec.serving.model_card import model_card

        def build(out: Path) -> dict[str, Any]:
            space, recipe = self.space, self.recipe
            exact = "float32" if recipe.backbone.load_in == "float32" else "bfloat16"
            backbone = space.tuned_backbone(load_in=exact).cpu()
            soft = backbone.all_soft_tokens(len(space.catalogue.item_ids))
            prompt = backbone.soft_prompt.detach().float().cpu()
            adapter = {} if backbone.adapter is None else backbone.adapter.state_dict()
            tokenizer = space.tokenizer
            tokenizer.add_tokens(space.layout.token_strings(), special_tokens=True)
            metrics = self.folder / "eval" / "metrics.json"
            return write_export(
                out,
                model=backbone.merged(),
                tokenizer=tokenizer,
                layout=space.layout,
                catalogue=space.catalogue,
                codes=space.semantic_ids.codes,
                popularity=space.popularity,
                soft_items=soft,
                soft_prompt=prompt,
                item_scores=backbone.item_scores,
                newcomers=space.newcomers,
                mixer=space.mixer,
                reranker=space.reranker,
                keys=space.exported_keys,
                intake=Intake(
                    encoders={
                        m: FrozenEncoder(m, getattr(recipe.encode, m), f.fitted, f.values.shape[1:])
                        for m, f in space.features.items()
                    },
                    quantiser=space.semantic_ids,
                    space=space.key_space,
                    words=space.words,
                    facts=None if space.kinship is None else space.facts,
                    kinship=space.kinship,
                    relatives=recipe.new_items.relatives,
                    lift=recipe.new_items.lift,
                ),
                adapter_state=adapter,
                adapter_settings={
                    "kind": recipe.adapter.kind,
                    **space.adapter_settings,
                    "dims": {m: f.values.shape[2] for m, f in space.features.items()},
                },
                tasks=[name for name, weight in recipe.finetune.mixture if weight],
                card=model_card(
                    name=recipe.name,
                    base=recipe.backbone.base,
                    data_summary={
                        "items": len(space.catalogue.item_ids),
                        "training histories": len(space.split.train),
                        "training events": int(space.popularity.sum()),
                    },
                    split=recipe.data.split,
                    metrics=json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else None,
                    settings=json.loads(recipe.model_dump_json()),
                ),
            )

        inputs = {**self.tuned_keys(), "catalog": key_at(self.shared / "catalog")}
        for stage in ("eval", "reranker"):
            if (self.folder / stage / MANIFEST).is_file():
                inputs[stage] = key_at(self.folder / stage)
        settings = {"name": self.recipe.name, "new_items": self.recipe.new_items.model_dump()}
        return run_stage(self.folder, "export", settings, inputs, build, self.force)

    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """Learning curves of pre-training, alignment and fine-tuning, where they exist."""
        curves = {}
        for name, stage in (("pre-train", "base"), ("align", "alignment")):
            folder = self.space.base_folder if stage == "base" else self.folder / stage
            if (folder / MANIFEST).is_file() and "curve" in read_manifest(folder)["result"]:
                curves[name] = read_manifest(folder)["result"]["curve"]
        curves["finetune"] = json.loads((self.folder / "lora" / "curve.json").read_text(encoding="utf-8"))
        return curves
