"""Speech: WAV files of every kind, commands with a tiny random Whisper, and real weights in a slow test."""

from __future__ import annotations

import shutil
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from compressor.commands.cli import main
from compressor.data.speech import read_wav
from compressor.errors import CompressorError
from compressor.evaluation.metrics import word_errors


def _wav(path: Path, samples: np.ndarray, rate: int, width: int = 2, channels: int = 1) -> str:
    scaled = np.round(samples * ((1 << (8 * width - 1)) - 1)).astype("<i4") + (128 if width == 1 else 0)
    data = scaled.view(np.uint8).reshape(-1, 4)[:, :width].repeat(channels, axis=0).tobytes()
    with wave.open(str(path), "wb") as file:
        file.setsampwidth(width)
        file.setnchannels(channels)
        file.setframerate(rate)
        file.writeframes(data)
    return str(path)


def _tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (22050, 2), (8000, 1)])
def test_wav_files_of_every_kind(tmp_path: Path, width: int, rate: int, channels: int) -> None:
    found = read_wav(_wav(tmp_path / "a.wav", _tone(rate), rate, width, channels), 16000)
    assert found.dtype == np.float32
    assert np.abs(found - _tone(16000)).max() < (0.02 if width == 1 else 0.01)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"text, no sound"])
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(CompressorError, match="as a WAV file"):
        read_wav(tmp_path / "a.wav", 16000)
    with pytest.raises(CompressorError, match="has no samples"):
        read_wav(_wav(tmp_path / "b.wav", np.zeros(0), 16000), 16000)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Whisper with the tokenizer of bytes."""
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path_factory.mktemp("speech") / "tiny-whisper"
    tokens = [*bytes_to_unicode().values(), "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    end = vocabulary["<|endoftext|>"]
    torch.manual_seed(0)
    sides = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = WhisperConfig(
        vocab_size=len(tokens) + 1501,
        d_model=16,
        **sides,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=end + 1,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config.no_timestamps_token_id = end + 2
    model.generation_config.max_length = 8
    letters = {vocabulary[letter] for letter in "abcdefghijklmnopqrstuvwxyz"}
    model.generation_config.suppress_tokens = [one for one in range(config.vocab_size) if one not in letters]
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": tokens[-2:]})
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_speech_is_written_down_and_compressed(
    tmp_path: Path, whisper: str, capsys: pytest.CaptureFixture[str], tiny_compressor: object
) -> None:
    audio = _wav(tmp_path / "talk.wav", _tone(16000), 16000)
    assert main(["transcribe", audio, "--speech", whisper]) == 0
    said = capsys.readouterr().out.strip()
    assert said
    assert main(["transcribe", audio, "-o", str(tmp_path / "talk.txt"), "--speech", whisper]) == 0
    assert (tmp_path / "talk.txt").read_text().strip() == said
    tiny_compressor.save_pretrained(tmp_path / "checkpoint")  # type: ignore[attr-defined]
    options = ["--checkpoint", str(tmp_path / "checkpoint"), "--no-measure"]
    for source, output in ((audio, "a.memory"), (str(tmp_path / "talk.txt"), "b.memory")):
        named = ["--speech", whisper] if source == audio else []
        assert main(["compress", source, "-o", str(tmp_path / output), *options, *named]) == 0
    assert (tmp_path / "a.memory").read_bytes() == (tmp_path / "b.memory").read_bytes()


def test_without_a_recogniser_the_message_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = _wav(tmp_path / "talk.wav", _tone(16000), 16000)
    for command in (["transcribe", audio], ["compress", audio, "-o", str(tmp_path / "a.memory")]):
        assert main(command) == 2
        assert "give --speech ID" in capsys.readouterr().err
    # Nobody should install a recogniser for a file that is not there.
    assert main(["transcribe", str(tmp_path / "gone.wav")]) == 2
    said = capsys.readouterr().err
    assert "gone.wav does not exist" in said
    assert "--speech" not in said
    assert main(["transcribe", audio, "--speech", str(tmp_path)]) == 2
    assert "cannot load the speech recogniser" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_whisper_understands_a_synthetic_voice(
    tmp_path: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "The weather was cold, but the meeting went on until the evening."
    subprocess.run(["espeak-ng", "-w", str(tmp_path / "a.wav"), text], check=True)
    folder = str(tmp_path / "whisper")
    subprocess.run([sys.executable, str(project / "examples" / "whisper_tiny_en.py"), folder], check=True)
    capsys.readouterr()
    assert main(["transcribe", str(tmp_path / "a.wav"), "--speech", folder]) == 0
    wrong, wanted = word_errors(capsys.readouterr().out, text)
    assert wrong <= wanted // 4
