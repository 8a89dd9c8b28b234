from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.errors import ArtifactError, ConfigError
from deploy.lent_arrays import BUFFERS_KEPT, LentArrays
from deploy.session import GENAI_CONFIG_NAME, GRAPH_NAME, OnnxDecoder
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model

IDS = np.arange(30, 70)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("session")
    checkpoint = make_checkpoint(save_model(base / "m"), base / "c", "W8A8", weights="rtn")
    make_export(checkpoint, base / "onnx")
    return base / "onnx"


def test_steps_over_the_cache_equal_the_whole_window(export: Path) -> None:
    with OnnxDecoder(export, threads=1) as decoder:
        assert (decoder.context_length, decoder.vocab_size) == (128, 262)
        whole = decoder.logits(IDS)
        assert whole.shape == (40, 262)
        decoder.start(capacity=64)
        parts = [decoder.append(IDS[None, :17])[0]]
        parts += [decoder.append(IDS[None, i : i + 1])[0] for i in range(17, 36)]
        parts.append(decoder.append(IDS[None, 36:])[0])  # several tokens over a cache
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=1e-4)


def test_logits_are_the_callers_as_long_as_any_part_of_them_is_held(export: Path) -> None:
    with OnnxDecoder(export, threads=1) as decoder:
        decoder.start(capacity=40)
        decoder.append(IDS[None, :10])
        steps = [decoder.append(IDS[None, i : i + 1]) for i in range(10, 20)]  # all held
        copies = [step.copy() for step in steps]
        parts = [steps[0][0], steps[1][:, :, 3:7], steps[2].reshape(-1)]
        expected = [part.copy() for part in parts]
        del steps
        places = []
        for i in range(20, 30):
            logits = decoder.append(IDS[None, i : i + 1])  # the one before is held until here
            places.append(logits.ctypes.data)
        assert len(set(places)) == 2
        assert places[::2] == places[:1] * 5, "memory that nobody holds is used again"
        for part, copy in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(part, copy)
        decoder.start(capacity=40)
        decoder.append(IDS[None, :10])
        for i, copy in zip(range(10, 20), copies, strict=True):
            logits = decoder.append(IDS[None, i : i + 1])
            np.testing.assert_array_equal(logits, copy)


def test_memory_is_used_again_only_if_nothing_reads_it() -> None:
    lent = LentArrays()
    first = lent.lend(lent.room((2, 3)))
    place = first.ctypes.data
    second = lent.lend(lent.room((2, 3)))
    assert second.ctypes.data != place
    row = first[0]
    del first
    assert lent.room((2, 3)).numpy().ctypes.data not in (place, second.ctypes.data)
    row[:] = 1
    del row
    assert lent.room((2, 3)).numpy().ctypes.data == place
    second[:] = 2
    assert (second == 2).all()


def test_memory_of_another_shape_is_given_up() -> None:
    lent = LentArrays()
    lent.lend(lent.room((2, 3)))  # free at once
    assert tuple(lent.room((3, 2)).shape()) == (3, 2)
    assert not lent._lent


def test_a_few_buffers_are_kept_and_the_others_are_the_callers() -> None:
    lent = LentArrays()
    held = [lent.lend(lent.room((2, 3))) for _ in range(5)]
    assert len(lent._lent) == BUFFERS_KEPT
    for number, array in enumerate(held):
        array[:] = number
    places = [array.ctypes.data for array in held]
    assert len(set(places)) == 5
    held = held[3:]
    del array
    fresh = lent.lend(lent.room((2, 3)))
    assert fresh.ctypes.data not in places[3:]
    fresh[:] = 9
    assert [array[0, 0] for array in held] == [3, 4]


def test_a_restart_forgets_what_was_in_the_cache(export: Path) -> None:
    with OnnxDecoder(export, threads=1) as decoder:
        decoder.start(capacity=40)
        first = decoder.append(IDS[None])
        decoder.start(capacity=40)
        decoder.append(IDS[None, ::-1])
        decoder.start(capacity=40)
        np.testing.assert_array_equal(decoder.append(IDS[None]), first)
        decoder.close()
        decoder.start(capacity=40)
        np.testing.assert_array_equal(decoder.append(IDS[None]), first)


def test_a_padded_prompt_ends_with_its_last_real_token(export: Path) -> None:
    ids, lengths = np.stack([IDS[:8], np.append(IDS[:5], IDS[20:23])]), np.array([8, 5])
    with OnnxDecoder(export, threads=1) as decoder:
        expected = [decoder.logits(IDS[:length])[-1] for length in lengths]
        decoder.start(capacity=8, batch=2)
        found = decoder.append(ids, lengths, last_only=True)
        np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=1e-4)
        decoder._chunk = 4  # chunks are of real tokens alone
        decoder.start(capacity=8)
        found = decoder.append(ids[1:], lengths[1:], last_only=True)
        np.testing.assert_allclose(found[:, 0], expected[1:], rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused(export: Path) -> None:
    with OnnxDecoder(export, threads=1) as decoder:
        with pytest.raises(ConfigError, match="129 tokens do not fit the context length of 128"):
            decoder.start(capacity=129)
        decoder.start(capacity=4)
        decoder.append(IDS[None, :3])
        with pytest.raises(ConfigError, match="room for 1 sequences of 4 tokens, asked for 1 of 5"):
            decoder.append(IDS[None, :2])
        with pytest.raises(ConfigError, match="no tokens to append"):
            decoder.append(IDS[None, :0])
        with pytest.raises(ConfigError, match="asked for 2 of"):
            decoder.append(np.stack([IDS[:1], IDS[:1]]))
        assert decoder.append(IDS[None, :1]).shape == (1, 1, 262)
        decoder.start(capacity=8, batch=2)
        decoder.append(np.stack([IDS[:3], IDS[3:6]]))
        with pytest.raises(ConfigError, match="2 sequences can go on by one token at a time"):
            decoder.append(np.stack([IDS[:2], IDS[:2]]))


def test_every_token_that_ends_a_text_is_known(export: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(export, tmp_path / "copy")
    described = json.loads((copy / GENAI_CONFIG_NAME).read_text())
    for ends in (7, [7], [7, 8, 9]):
        described["model"]["eos_token_id"] = ends
        (copy / GENAI_CONFIG_NAME).write_text(json.dumps(described))
        with OnnxDecoder(copy, threads=1) as decoder:
            assert decoder.end_ids == frozenset(ends if isinstance(ends, list) else [ends])


def test_damaged_files_are_named(export: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(export, tmp_path / "copy")
    (copy / GRAPH_NAME).write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"model.onnx: ONNX Runtime cannot load it"):
        OnnxDecoder(copy)
    shutil.copyfile(export / GRAPH_NAME, copy / GRAPH_NAME)
    (copy / f"{GRAPH_NAME}.data").unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx: ONNX Runtime cannot load it"):
        OnnxDecoder(copy)
    for content in ("{", "{}", json.dumps({"model": {"decoder": {}}})):
        (copy / GENAI_CONFIG_NAME).write_text(content)
        with pytest.raises(ArtifactError, match=r"genai_config.json: not readable.*export again"):
            OnnxDecoder(copy)
    (copy / GENAI_CONFIG_NAME).unlink()
    with pytest.raises(ArtifactError, match=r"genai_config.json"):
        OnnxDecoder(copy)


def test_the_example_script_answers_without_torch(export: Path) -> None:
    root = Path(__file__).parents[2]
    blocked = "import sys; sys.modules.update(torch=None, transformers=None); import runpy; "
    script = f"sys.argv = ['generate.py', {str(export)!r}, 'hello']; " + (
        f"runpy.run_path({str(root / 'examples' / 'generate.py')!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", blocked + script], capture_output=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.strip()
