"""Names of pretrained models: what is looked for where, and what the error says."""

import pytest

from mmskip.utils.pretrained import pretrained


class Hub:
    """Counts what it is asked for and has nothing."""

    def __init__(self):
        self.asked = []

    def __call__(self, name, local_files_only=False):
        if not local_files_only:
            self.asked.append(name)
        raise OSError("We couldn't connect\nand more")


@pytest.mark.parametrize("name", ["data/vlm_base", "./model", "/no/such/model", "a/b/model"])
def test_the_hub_is_not_asked_for_a_folder_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    hub = Hub()
    with pytest.raises(ValueError, match=f"vlm='{name}' is not a local folder.*hub was not asked.* Train it first"):
        pretrained("vlm", name, hub, "Train it first.")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["org/model", "bert-base"])
def test_the_hub_is_asked_for_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    with pytest.raises(ValueError, match=f"llm='{name}' is not a local folder.*We couldn't connect"):
        pretrained("llm", name, hub)
    assert hub.asked == [name]


def test_reasons_are_told_whatever_the_error_looks_like():
    def failing(error):
        def load(name):
            raise error

        return load

    with pytest.raises(ValueError, match=r"full path"):
        pretrained("llm", "~/model", failing(OSError("never asked")))
    with pytest.raises(ValueError, match=r"\(OSError\)"):
        pretrained("llm", "org/model", failing(OSError("")))
    with pytest.raises(ValueError, match="needs a package that is not installed: sentencepiece"):
        pretrained("llm", "org/model", failing(ImportError("\nsentencepiece is not here")))


def test_what_is_there_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "model").mkdir(parents=True)
    assert pretrained("llm", "data/model", lambda name: name) == "data/model"
    # no folder, but in the local cache
    assert pretrained("llm", "data/cached", lambda name, local_files_only: (name, local_files_only)) == (
        "data/cached",
        True,
    )
