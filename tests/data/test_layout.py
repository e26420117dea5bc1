"""Which files of a folder are rows, and of which split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask.config.data import DatasetConfig
from unmask.data.sources import open_rows
from unmask.errors import DataError


def put(folder: Path, *names: str) -> str:
    """Write a file of one row, whose answer is the file's own path, for each name; return the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}]
        path.write_text(json.dumps({"messages": turns}) + "\n")
    return str(folder)


def read(folder: str, **options: str) -> list[str]:
    rows = open_rows(DatasetConfig(folder, **options))
    return [rows[i].messages[-1].content for i in range(len(rows))]


HIDDEN = [
    "._train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl", ".cache/huggingface/train.json",
    "__pycache__/train.jsonl", "data/._train.jsonl", "dataset_info.json", "data/dataset_infos.json", "config.json",
]  # fmt: skip


def test_hidden_files_and_descriptions_are_no_data(tmp_path):
    folder = put(tmp_path / ".hidden" / "rows", "data/train.jsonl", *HIDDEN)
    assert read(folder) == ["data/train.jsonl"]
    with pytest.raises(DataError, match=r"holds no \.jsonl.* file and no saved dataset"):
        read(put(tmp_path / "nothing", *HIDDEN))


def test_a_folder_that_was_downloaded_from_the_hub(fixtures):
    answers = read(str(fixtures / "reports" / "hub_folder"))
    assert answers == read(str(fixtures / "reports" / "hub_folder" / "data" / "train.jsonl"))
    assert answers == read(str(fixtures / "reports" / "hub_folder"), split="train")


LAYOUTS = {
    "shards": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], ["data/test-00000-of-00001.jsonl"],
    ),
    "hashed_shards": (["data/train-00000-of-00001-0a1b2c.jsonl"], ["data/test-00000-of-00001-3d4e5f.jsonl"]),
    "files": (["train.jsonl"], ["test.jsonl"]),
    "files_below": (["data/my_train_2.jsonl", "data/train.json"], ["data/sub/2024.test.jsonl"]),
    "folders": (["train/a.jsonl", "train/b.jsonl"], ["test/a.jsonl"]),
    "folders_below": (["data/train/part/0.jsonl"], ["data/test-set/0.jsonl"]),
    "a_folder_says_more_than_a_name": (["train/test_1.jsonl"], ["test/train_1.jsonl"]),
    "other_words": (["training/0.jsonl"], ["evaluation.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("train, test", LAYOUTS.values(), ids=LAYOUTS)
def test_splits_of_files_and_folders_are_read_as_the_hub_reads_them(tmp_path, train, test):
    folder = put(tmp_path, *train, *test)
    assert (read(folder, split="train"), read(folder, split="test")) == (train, test)
    with pytest.raises(DataError, match=r"belong to several splits \(.*\); set dataset.split"):
        read(folder)


def test_a_split_of_its_own_name_is_known_by_its_shards(tmp_path):
    folder = put(tmp_path, "data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl")
    assert read(folder, split="train_sft") == ["data/train_sft-00000-of-00001.jsonl"]
    with pytest.raises(DataError, match="has train_gen, train_sft, not 'train'"):
        read(folder, split="train")


def test_the_words_for_a_split_mean_the_same(tmp_path):
    folder = put(tmp_path / "one", "dev.jsonl", "train.jsonl")
    assert read(folder, split="dev") == read(folder, split="validation") == read(folder, split="val") == ["dev.jsonl"]
    assert read(put(tmp_path / "two", "dev.jsonl", "valid-2.jsonl")) == ["dev.jsonl", "valid-2.jsonl"]


def test_files_of_no_split_beside_others_are_not_passed_over_in_silence(tmp_path):
    folder = put(tmp_path, "train.jsonl", "more.jsonl")
    with pytest.raises(DataError, match=r"several splits \(train; more.jsonl is of none\)"):
        read(folder)
    assert read(folder, split="train") == ["train.jsonl"]


@pytest.mark.parametrize("name", ["train-2.jsonl.gz", "train.csv", "data/train.tsv", "a.parquet.zst", "b.ndjson"])
def test_data_of_a_form_that_is_not_read_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=f"{name} is none of .jsonl, .*convert or unpack it"):
        read(put(tmp_path, "train.jsonl", name))


def card(folder: Path, configs: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}---\n\n# Rows\n")


def test_configurations_that_the_readme_lists_are_kept_apart(tmp_path):
    folder = put(tmp_path, "main/train-00000-of-00001.jsonl", "main/test-00000-of-00001.jsonl", "socratic/train.jsonl")
    card(
        tmp_path,
        "- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
        "  - split: test\n    path: [main/test-*]\n"
        "- config_name: socratic\n  data_files: socratic/*.jsonl\n",
    )
    with pytest.raises(DataError, match="dataset.name: .*README.md lists the configurations main, socratic and no one"):
        read(folder)
    assert read(folder, name="main", split="test") == ["main/test-00000-of-00001.jsonl"]
    assert read(folder, name="socratic") == ["socratic/train.jsonl"]
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        read(folder, name="main")
    with pytest.raises(DataError, match="not 'mian' .did you mean 'main'"):
        read(folder, name="mian")


@pytest.mark.parametrize("default", ["- config_name: default", "- default: true\n  config_name: x"])
def test_the_default_configuration_is_taken(tmp_path, default):
    folder = put(tmp_path, "a/0.jsonl", "b/0.jsonl")
    card(tmp_path, f"{default}\n  data_dir: a\n- config_name: other\n  data_dir: b\n")
    assert read(folder) == ["a/0.jsonl"]
    assert read(folder, name="other") == ["b/0.jsonl"]


@pytest.mark.parametrize(
    "configs, problem",
    [
        ("- config_name: x\n  data_files: none/*\n", "README.md: no file of configuration 'x' matches 'none/\\*'"),
        ("- config_name: x\n  data_files: 3\n", "README.md: the data_files of configuration 'x' cannot be read"),
        ("- config_name: x\n  data_files: /etc/*\n", "README.md: configuration 'x' names '/etc/\\*', outside its"),
        ("- config_name: x\n  data_files: ../rows/*\n", "configuration 'x' names '../rows/\\*', outside its folder"),
        ("- config_name: x\n  data_dir: a/../..\n", "configuration 'x' names 'a/../..', outside its folder"),
        ("- config_name: x\n  data_dir: /etc\n", "configuration 'x' names '/etc', outside its folder"),
        ("- name: x\n", "README.md: its list of configurations cannot be read"),
        ("- x: [\n", "README.md: its list of configurations cannot be read"),
    ],
)
def test_a_readme_that_names_no_files_is_refused(tmp_path, configs, problem):
    folder = put(tmp_path, "train.jsonl")
    card(tmp_path, configs)
    with pytest.raises(DataError, match=problem):
        read(folder)


def test_a_name_without_configurations_is_refused(tmp_path):
    folder = put(tmp_path, "train.jsonl")
    (tmp_path / "README.md").write_text("---\nA rule, and no metadata: [\n---\n")
    with pytest.raises(DataError, match="dataset.name: .* has no README.md that lists configurations; delete it"):
        read(folder, name="main")
    assert read(folder) == ["train.jsonl"]
