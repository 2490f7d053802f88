from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_grit.data.builders.sentences import PunktModel, SentenceSplitter, find_language, load_punkt, train_punkt
from megatron_grit.errors import ConfigError, DataError

pytest.importorskip("nltk")

MODEL = PunktModel(
    abbreviations=["dr", "u.s"], collocations=[], sentence_starters=["then"], orthographic_context={"smith": 8}
)
TEXT = 'Dr. Smith left.\n\nHe said "Stop!"  Then he came back. Why? '


def test_abbreviations_end_no_sentence():
    expected = ["Dr. Smith left.", 'He said "Stop!"', "Then he came back.", "Why?"]
    assert SentenceSplitter(MODEL).split(TEXT) == expected
    without = PunktModel(abbreviations=[], collocations=[], sentence_starters=[], orthographic_context={})
    assert SentenceSplitter(without).split(TEXT)[:2] == ["Dr.", "Smith left."]


def test_white_space_is_kept_with_the_sentence_before_it():
    expected = ["Dr. Smith left.\n\n", 'He said "Stop!"  ', "Then he came back. ", "Why? "]
    assert SentenceSplitter(MODEL, keep_newlines=True).split(TEXT) == expected


@given(st.text(st.sampled_from("ab. \n!?\"')D\u00e9U"), max_size=60))
def test_sentences_with_their_white_space_are_the_text(text):
    kept = SentenceSplitter(MODEL, keep_newlines=True).split(text)
    assert "".join(kept) == text
    bare = [sentence for sentence in SentenceSplitter(MODEL).split(text) if sentence.strip()]
    assert [sentence.strip() for sentence in kept if sentence.strip()] == [sentence.strip() for sentence in bare]


def test_splitting_does_not_collect_words():
    splitter = SentenceSplitter(MODEL)
    for number in range(100):
        splitter.split(f"Dr. Another{number} is here.")  # what comes after an abbreviation is looked up
    assert len(splitter._punkt._params.ortho_context) == 1


def test_training_learns_abbreviations_whatever_the_order_of_sets(tmp_path):
    script = (
        "from megatron_grit.data.builders.sentences import train_punkt\n"
        "text = 'The firm Acme Inc. makes nails. It sold Acme Inc. shares to Bolt Inc. last May. We sold none. '\n"
        "print(train_punkt([text * 20, 'See p. 5 and p. 7 of it. ' * 20], {'source': 1}).to_json(), end='')\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in "12"
    ]
    assert outputs[0] == outputs[1]
    path = tmp_path / "punkt.json"
    path.write_text(outputs[0], encoding="utf-8")
    model = load_punkt(path)
    assert {"inc", "p"} <= set(model.abbreviations)
    assert model.trained_on == {"source": 1}
    assert SentenceSplitter(model).split("He left Acme Inc. on Monday. Good.")[-1] == "Good."


def test_training_needs_text():
    with pytest.raises(DataError, match="no text"):
        train_punkt([])


def test_nltk_tables_of_a_language_are_read(tmp_path, monkeypatch):
    import nltk.data

    folder = tmp_path / "tokenizers" / "punkt_tab" / "klingon"
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text("dr\nu.s\n")
    (folder / "collocations.tab").write_text("p\tsmith\n")
    (folder / "sent_starters.txt").write_text("then\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nothing"), str(tmp_path)])
    with pytest.raises(ConfigError, match="no Punkt parameters for 'klingon'"):
        find_language("klingon")
    with pytest.raises(DataError, match=r"ortho_context\.tab: not a punkt_tab folder"):
        load_punkt(folder)
    (folder / "ortho_context.tab").write_text("smith\t8\nnone\t0\n")
    assert load_punkt(find_language("klingon")) == PunktModel(
        abbreviations=["dr", "u.s"],
        collocations=[["p", "smith"]],
        sentence_starters=["then"],
        orthographic_context={"smith": 8},
    )
    (folder / "ortho_context.tab").write_text("smith\n")
    with pytest.raises(DataError, match="not a punkt_tab folder"):
        load_punkt(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04\x95", "pickles are not read"),
        (b"[]", "not a Punkt model"),
        (b'{"format": "other"}', "not a Punkt model"),
        (b'{"format": "megatron_grit.punkt", "version": 9}', "version 9"),
        (b'{"format": "megatron_grit.punkt", "version": 1, "abbreviations": []}', "incomplete"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, content, message):
    path = tmp_path / "punkt.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_punkt(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_punkt(tmp_path / "missing")


def test_a_model_comes_back_as_it_was(tmp_path):
    path = tmp_path / "punkt.json"
    path.write_text(MODEL.to_json(), encoding="utf-8")
    assert load_punkt(path) == MODEL
    values = json.loads(MODEL.to_json())
    path.write_text(json.dumps({**values, "collocations": [["one"]]}))
    with pytest.raises(DataError, match="incomplete"):
        load_punkt(path)
