"""Where the splits of a text data set come from: local files or the hub."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset

from lrcompress.errors import SettingError
from lrcompress.tasks.tables import quiet, read_table


@dataclass(frozen=True)
class Sources:
    """The splits of a data set.

    Attributes:
        name: of the data set on the hub; None for local files.
        config: its configuration.
        splits: "train", "val" and "test", each a split of the hub's, or a file; None if there
            is none.
    """

    name: str | None
    config: str | None
    splits: dict[str, str | None]

    @classmethod
    def of(
        cls,
        name: str | None,
        config: str | None,
        hub: dict[str, str],
        files: dict[str, str | None],
    ) -> "Sources":
        """Return the files if there is one to train on, and otherwise the splits on the hub.

        Files to validate and to test on are found beside the one to train on.

        Args:
            name: data set on the hub.
            config: its configuration.
            hub: its split for "train", "val" and "test".
            files: the same as local files.

        Raises:
            SettingError: if there is nothing to train on.
        """
        train = files["train"]
        if (name is None and train is None) or (train is None and (files["val"] or files["test"])):
            given = {"name": name, "val": files["val"], "test": files["test"]}
            raise SettingError(
                "give `name`, a data set on the hub, or `train`, a local file, on which `val` and "
                f"`test` depend; got { {k: v for k, v in given.items() if v} or 'neither' }"
            )
        if train is None:
            return cls(name, config, dict(hub))
        val = files["val"] or _beside(train, ("val", "valid", "validation", "dev"))
        test = files["test"] or _beside(train, ("test",))
        return cls(None, None, {"train": train, "val": val, "test": test})

    def read(
        self, split: str, header: bool = True, quoting: bool | None = None
    ) -> tuple[Dataset, str] | None:
        """Return the rows of a split, and how messages call it; None if there is no such split.

        Args:
            split: "train", "val" or "test".
            header: whether the first line of a CSV or TSV file names its columns.
            quoting: whether a CSV or TSV file puts fields in double quotes.

        Raises:
            NoMatchError: if there is no such local file.
            SettingError: if a local file cannot be read as a table.
        """
        source = self.splits[split]
        if source is None:
            return None
        if self.name is None:
            return read_table(source, header, quoting), source
        with quiet():
            return load_dataset(self.name, self.config, split=source), f"{self.name}, {source}"


def _beside(train: str, names: tuple[str, ...]) -> str | None:
    """Return the file that is to ``train`` as ``val`` or ``test`` is, if there is one."""
    path = Path(train)
    others = [path.with_name(path.name.replace("train", name)) for name in names]
    return next((str(other) for other in others if other != path and other.is_file()), None)
