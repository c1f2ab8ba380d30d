"""Training configurations: what is wrong is named, with the nearest right thing."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from speciesmap.config import (
    AnyConfig,
    PretrainConfig,
    load_config,
    shipped_config,
)
from speciesmap.demo.scene import assigned
from speciesmap.errors import ConfigError

SHIPPED = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def pretrain(**changes: Any) -> dict[str, Any]:
    base = {
        "stage": "pretrain",
        "data": {"dataset": "chips"},
        "model": {"aerial": {"backbone": "test_resnet"}},
    }
    return {**base, **changes}


def finetune(**changes: Any) -> dict[str, Any]:
    return {"stage": "finetune", "init": "run", "data": {"dataset": "chips"}, **changes}


def classify(**changes: Any) -> dict[str, Any]:
    return {"stage": "classify", "init": "run", "data": {"dataset": "chips"}, **changes}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert isinstance(load_config(path), AnyConfig)
    assert shipped_config(path.name).read_bytes() == path.read_bytes()


def test_there_are_shipped_configurations_and_others_are_refused() -> None:
    assert len(SHIPPED) >= 2
    with pytest.raises(ConfigError, match=r"nothing.yaml is no file, nor .* crisp, crisp_nmv, "):
        shipped_config("nothing.yaml")


def test_shipped_configurations_are_found_by_name_where_there_is_no_such_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_config(shipped_config("crisp"))
    for name in ("crisp", "crisp.yaml", "configs/crisp.yaml"):
        assert load_config(name) == shipped
    for name in ("crips", "configs/crips.yaml"):
        with pytest.raises(ConfigError, match=r"crips.* is no file, nor a configuration"):
            load_config(name)
    for name in ("../crisp", "other/crisp.yaml", str(tmp_path / "crisp.yaml")):
        with pytest.raises(ConfigError, match=r"crisp.* does not exist; check the path"):
            load_config(name)
    Path("crisp").mkdir()  # as an output of that name
    assert load_config("crisp") == shipped
    with pytest.raises(ConfigError, match="is not readable YAML"):
        load_config("a" * 300)
    Path("crisp.yaml").write_text("stage: pretrain\n")
    with pytest.raises(ConfigError, match="data"):
        load_config("crisp.yaml")  # one's own comes first


def test_inputs_name_the_file_of_a_covariate_whatever_its_path_holds() -> None:
    data = {"dataset": "chips", "covariates": ["wet=a/wet.tif", "/data/a=b/dry.tif", "plain.tif"]}
    config = load_config(finetune(data=data))
    assert {"a/wet.tif", "/data/a=b/dry.tif", "plain.tif"} <= set(config.data.inputs)


def test_a_mapping_is_read_and_left_as_it_is() -> None:
    given = pretrain(optim={"epochs": 3})
    config = load_config(given, ["optim.lr=0.5", "seed=4"])
    assert isinstance(config, PretrainConfig)
    assert (config.optim.epochs, config.optim.lr, config.seed) == (3, 0.5, 4)
    assert given == pretrain(optim={"epochs": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pretrain(sead=1), r"unknown key 'sead'; did you mean 'seed'\?"),
        (pretrain(optim={"epoch": 1}), r"unknown key 'optim.epoch'; did you mean 'epochs'\?"),
        (
            pretrain(model={"aerial": {"backbone": "x", "pretraind": True}}),
            r"unknown key 'model.aerial.pretraind'; did you mean 'pretrained'\?",
        ),
        (
            pretrain(model={"aerial": {"backbone": "x"}, "ground": {"backbone": "x", "img_px": 1}}),
            r"unknown key 'model.ground.img_px'; did you mean 'image_px'\?",
        ),
        (
            finetune(validation={"block_m": 5, "fold": 2}),
            r"unknown key 'validation.fold'; did you mean 'folds'\?",
        ),
        (pretrain(init="run"), r"unknown key 'init'"),
        (pretrain(optim={"qqqqqqq": 1}), r"unknown key 'optim.qqqqqqq'; did you mean 'batch_size'"),
        (
            finetune(stage="fine-tune"),
            "'stage' must be one of pretrain, finetune, classify, got 'fine-tune'",
        ),
        ({"data": {}}, "'stage' must be one of pretrain, finetune, classify, got None"),
        ({"stage": "finetune", "data": {}}, "key 'init' is missing"),
        (pretrain(optim={"lr": -1}), r"optim.lr = -1: input should be greater than 0"),
        (pretrain(optim={"epochs": True}), "optim = {'epochs': True}: epochs takes no yes or no"),
        (finetune(positive_weight=False), "configuration: positive_weight takes no yes or no"),
        (pretrain(data={"dataset": True}), "dataset takes no yes or no; quote it if it is a name"),
        (
            pretrain(model={"dim": 10**9, "aerial": {"backbone": "x"}}),
            "model.dim = 1000000000: input should be less than or equal to 8192",
        ),
        (
            pretrain(masked={"decoder_depth": 10**6}),
            "masked.decoder_depth = 1000000: input should be less than or equal to 128",
        ),
        (
            pretrain(model={"aerial": {"backbone": "x"}, "text": {"hub": "ViT-B-32"}}),
            "model.text.hub = 'ViT-B-32': write hf-hub:OWNER/NAME, or local-dir:PATH for a folder",
        ),
        (pretrain(method="clip"), "method = 'clip'"),
        (pretrain(seed=-1), "seed = -1: input should be greater than or equal to 0"),
        (finetune(seed=2**32), "seed = 4294967296: input should be less than 4294967296"),
        (
            finetune(data={"stream": {}}),
            "data = .*: only stage pretrain streams",
        ),
        (
            classify(data={"stream": {}}),
            "data = .*: only stage pretrain streams",
        ),
        (
            classify(data={"dataset": "chips", "covariates": ["rain.tif"]}),
            "stage classify does not read data.covariates, it is for stage finetune; leave it out",
        ),
        (classify(data={"percent": 5.0}), "stage classify does not read data.percent"),
        (pretrain(data={"bias": "effort.tif"}), "stage pretrain does not read data.bias"),
        (classify(data={"steam": {}}), r"unknown key 'data.steam'; did you mean 'stream'\?"),
        (pretrain(data=3), "data = 3"),
        (pretrain(data={"background": 0}), r"data.background = 0: input should be greater"),
        (
            finetune(validation={"block_m": 5, "prevalence": 1.5}),
            r"validation.prevalence = 1.5: input should be less than 1",
        ),
        (
            finetune(validation={"block_m": 5, "prevalence": {"Quercus lobata": 0}}),
            r"validation.prevalence = .*: input should be",
        ),
        (
            finetune(validation={"folds": 2}),
            "validation = {'folds': 2}: folds by blocks need block_m",
        ),
        (pretrain(masked={"decoder_dim": 66}), "masked.decoder_dim = 66.*multiple of 4"),
        (pretrain(optim={"lr": math.inf}), "optim.lr = inf: input should be a finite number"),
        (
            pretrain(model={"aerial": {"backbone": "x", "std": [1.0, 0.0]}}),
            r"model.aerial.std.1 = 0.0: input should be greater than 0",
        ),
        (
            finetune(data={"bias": "effort.tif", "background": "places.csv"}),
            "bias says where a number of background places is drawn",
        ),
        (
            finetune(data={"bias": "effort.tif", "background_kind": "target-group"}),
            "bias says where a number of background places is drawn",
        ),
        (classify(init={}), "init names no model; give a folder, or several by name"),
        (
            classify(splits={"train": "a", "test": "a"}),
            "splits = .*train, validation and test must name three splits",
        ),
        (classify(trainer={"devices": 2}), "stage classify trains on one device"),
        (
            classify(trainer={"precision": "16-mixed"}),
            "stage classify trains with trainer.precision auto or bf16-mixed or 32-true",
        ),
        (
            finetune(freeze_encoder=True, head={}, trainer={"devices": 2}),
            "configuration: heads on a frozen encoder are fitted on one device; leave trainer.dev",
        ),
        (
            finetune(
                freeze_encoder=True,
                data={"covariates": ["rain.tif"]},
                trainer={"precision": "bf16-mixed"},
            ),
            "are fitted with trainer.precision auto or 32-true; set that, or leave it out",
        ),
        (classify(optim={"warmup": 0.5}), "stage classify does not read optim.warmup"),
        (classify(optim={"chunk_size": 8}), "stage classify does not read optim.chunk_size"),
    ],
)
def test_what_is_wrong_is_named_on_one_line(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(content)
    assert "\n" not in str(caught.value)


def test_changes_are_yaml_and_reach_any_depth() -> None:
    config = load_config(
        pretrain(),
        [
            "model.ground={backbone: test_vit, image_px: 32}",
            "model.aerial.kwargs.patch_size=8",
            "data.withheld=[Quercus lobata]",
            "data.imagery=a=b.tif",
            "model.text.hub=",
        ],
    )
    assert isinstance(config, PretrainConfig)
    assert config.model.ground is not None
    assert (config.model.ground.backbone, config.model.ground.image_px) == ("test_vit", 32)
    assert config.model.aerial.kwargs == {"patch_size": 8}
    assert config.data.withheld == ["Quercus lobata"]
    assert config.data.imagery == "a=b.tif"
    assert config.model.text is not None
    assert config.model.text.hub is None


@pytest.mark.parametrize("path", ["demo #1: ü/chips", "2024", "~", "[a]", "'a' \"b\"", "yes", "😀"])
def test_a_path_of_any_characters_can_be_assigned(path: str) -> None:
    assert load_config(pretrain(), [assigned("data.dataset", path)]).data.dataset == path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.lr", r"--set 'optim.lr' is no assignment; write --set optim.lr=0.001"),
        ("=3", "is no assignment"),
        ("optim.=3", "names no key"),
        ("optim.lr=[1", "not readable YAML"),
        ("stage.lr=1", r"--set 'stage.lr=1': stage is 'pretrain', not a section"),
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("optim=3", "optim = 3"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(pretrain(), [change])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "is not a mapping"),
        (b"", "is not a mapping"),
        (b"stage: [pretrain", "is not readable YAML"),
        (b"seed: 1\nseed: 2\n", "is not readable YAML: the key 'seed' stands twice; keep one"),
        (b"\xff\xfe\x00", "is not readable YAML"),
        (b"!!python/object/apply:os.system ['true']", "is not readable YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"bad.yaml {message}") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is not readable YAML"):
        load_config(tmp_path)


@pytest.mark.parametrize("value", ["[" * 3000, "{a: " * 3000, "!!python/name:os.system"])
def test_a_value_that_is_nested_too_deeply_or_names_code_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="not readable YAML") as refused:
        load_config(shipped_config("demo_crisp.yaml"), [f"optim.lr={value}"])
    assert len(str(refused.value)) < 400


def test_the_page_of_configurations_tells_the_keys_as_they_are() -> None:
    docs = Path(__file__).parent.parent / "docs"
    told = runpy.run_path(str(docs / "keys.py"))["page"]()
    assert (docs / "configuration.md").read_text() == told, "run python docs/keys.py"
    for key in ("optim", "model.aerial.factored", "data.stream"):
        assert f"\n## {key}\n" in told
