"""Latents in safetensors and tars: what is read is what was written, only one's own frames, and bad files are named."""

import io
import json
import os
import pickle
import re
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from megatron_dsp import shard_range
from megatron_dsp.data import DataError, LatentShards, VideoBatch, VideoBatches, stored_tensors

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def npy(tensor, **arguments):
    content = io.BytesIO()
    np.save(content, tensor.numpy() if isinstance(tensor, torch.Tensor) else tensor, **arguments)
    return content.getvalue()


def write_safetensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def write_tar(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, tensor in tensors.items():
            add(archive, f"{name}.npy", npy(tensor))
    return path


def write_tar_of_safetensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = {}
    for name, tensor in tensors.items():
        sample, _, part = name.rpartition(".")
        samples.setdefault(sample, {})[part] = tensor
    with tarfile.open(path, "w") as archive:
        for sample, parts in samples.items():
            add(archive, f"{sample}.json", b"{}")  # what else a webdataset holds is no concern of ours
            add(archive, f"{sample}.safetensors", save(parts))
    return path


WRITERS = {"a.safetensors": write_safetensors, "a.tar": write_tar, "b.tar": write_tar_of_safetensors}
TENSORS = {
    "clip.1.latent": random(6, 4, 3, 5, seed=1),
    "clip.1.text": random(7, 8, seed=2),
    "clip.1.mask": torch.tensor([1, 1, 0, 1, 0, 0, 0], dtype=torch.uint8),
    "clip.2.latent": random(5, 4, 2, 2, seed=3),
    "image.latent": random(4, 3, 5, seed=4),
    "image.text": random(3, 8, seed=5),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in WRITERS for dtype in (torch.float32, torch.float16)]
    + [("a.safetensors", torch.bfloat16), ("b.tar", torch.bfloat16)],  # NumPy has no bfloat16
)
def test_what_was_written_is_read(tmp_path, name, dtype):
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in TENSORS.items()}
    WRITERS[name](tmp_path / name, tensors)
    shards = LatentShards(tmp_path)
    assert len(shards) == 3
    assert [shards.shape(index) for index in range(3)] == [(6, 4, 3, 5), (5, 4, 2, 2), (1, 4, 3, 5)]
    for index, key in enumerate(("clip.1", "clip.2", "image")):
        latent = tensors[f"{key}.latent"].reshape(shards.shape(index))
        frames = len(latent)
        for start in range(frames + 1):
            for stop in range(start, frames + 1):
                part = shards.read(index, start, stop)
                assert part.dtype == dtype
                assert torch.equal(part, latent[start:stop])
    assert (shards.conditioning_tokens, shards.conditioning_width) == (7, 8)
    text, mask = shards.conditioning(0)
    assert mask.tolist() == [True, True, False, True, False, False, False]
    assert torch.equal(text, tensors["clip.1.text"].float() * mask[:, None])
    text, mask = shards.conditioning(1)
    assert not mask.any()
    assert torch.equal(text, torch.zeros(7, 8))
    text, mask = shards.conditioning(2)
    assert mask.tolist() == [True] * 3 + [False] * 4, "without a mask all tokens are there"
    assert torch.equal(text[:3], tensors["image.text"].float())
    assert not text[3:].any()


@pytest.mark.parametrize("name", WRITERS)
def test_channels_may_come_first(tmp_path, name):
    latent, image = random(4, 6, 3, 5), random(4, 3, 5)
    WRITERS[name](tmp_path / name, {"clip.latent": latent, "image.latent": image})
    shards = LatentShards(tmp_path, latent_dims="CTHW")
    assert [shards.shape(index) for index in range(2)] == [(6, 4, 3, 5), (1, 4, 3, 5)]
    for start, stop in ((0, 6), (2, 5), (3, 3)):
        assert torch.equal(shards.read(0, start, stop), latent.transpose(0, 1)[start:stop])
    assert torch.equal(shards.read(1, 0, 1), image[None])


@pytest.mark.parametrize("dims", ["TCHW", "CTHW"])
def test_arrays_in_fortran_order_are_read_too(tmp_path, dims):
    latent, image = random(4, 4, 3, 5), random(4, 3, 5)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "clip.latent.npy", npy(np.asfortranarray(latent.numpy())))
        add(archive, "image.latent.npy", npy(np.asfortranarray(image.numpy())))
    shards = LatentShards(tmp_path, latent_dims=dims)
    expected = latent if dims == "TCHW" else latent.transpose(0, 1)
    assert torch.equal(shards.read(0, 1, 3), expected[1:3])
    assert torch.equal(shards.read(1, 0, 1), image[None])


def test_files_and_their_samples_come_sorted_and_names_may_repeat(tmp_path):
    for number, name in enumerate(["b.safetensors", "sub/a.tar", "a.tar", "sub.tar", "only.safetensors"]):
        tensors = {"000.latent": random(1 + number, 1, 1, 1)} if number < 4 else {"latent": random(5, 1, 1, 1)}
        (write_tar if name.endswith(".tar") else write_safetensors)(tmp_path / name, tensors)
    write_tar(tmp_path / "z.tar", {"b.latent": random(7, 1, 1, 1), "a.latent": random(6, 1, 1, 1)})
    (tmp_path / "notes.txt").write_text("not looked at")
    shards = LatentShards(tmp_path)
    assert [shards.shape(index).frames for index in range(7)] == [3, 1, 5, 4, 2, 6, 7]


def batches_of(shards, **arguments):
    settings = {"seed": 1, "patch": (1, 1, 1), "drop_probability": 0.5, "clean_frame_probability": 0.5}
    return VideoBatches(samples=shards, global_batch_size=2, **(settings | arguments))


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts what is really read, and where."""
    reads, preadv = [], os.preadv

    def counted(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        reads.append((offset, count))
        return count

    monkeypatch.setattr(stored_tensors.os, "preadv", counted)
    return reads


@pytest.mark.parametrize("dims", ["TCHW", "CTHW"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_rank_reads_its_own_frames_alone(tmp_path, bytes_read, name, dims):
    frame = 4 * 3 * 5 * 4
    latent = random(6, 4, 3, 5)
    WRITERS[name](tmp_path / name, {"a.latent": latent if dims == "TCHW" else latent.transpose(0, 1).contiguous()})
    shards = LatentShards(tmp_path, latent_dims=dims)
    batches = batches_of(shards)
    assert bytes_read == [], "opening reads headers alone"
    places = set()
    for rank in range(4):
        start, stop = shard_range(6, 4, rank)
        part = batches.batch([0, 1], range(start, stop))
        assert torch.equal(part.video, torch.stack([latent[start:stop]] * 2, dim=1))
        assert sum(count for _, count in bytes_read) == 2 * (stop - start) * frame
        assert len(bytes_read) == (2 if dims == "TCHW" else 2 * 4)
        own = {place for offset, count in bytes_read for place in range(offset, offset + count)}
        assert not own & places
        places |= own
        bytes_read.clear()
    assert len(places) == 6 * frame, "together they read the whole latent"
    batches.batch([0, 1], range(6, 6))
    assert bytes_read == []


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("ranks", range(1, 6))
def test_the_ranks_of_a_sequence_group_hold_one_batch(tmp_path, name, ranks):
    WRITERS[name](tmp_path / name, TENSORS)
    batches = batches_of(LatentShards(tmp_path))
    seen = set()
    for step in range(3):
        positions = [2 * step, 2 * step + 1]
        frames = batches.shape(positions).frames
        seen.add(frames)
        whole = batches.batch(positions, range(frames))
        parts = [batches.batch(positions, range(*shard_range(frames, ranks, rank))) for rank in range(ranks)]
        for field in fields(VideoBatch):
            for part in parts:
                if field.name not in ("video", "noise"):
                    assert torch.equal(getattr(part, field.name), getattr(whole, field.name))
        assert torch.equal(torch.cat([part.video for part in parts]), whole.video)
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert seen == {1, 5, 6}


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def write_header(path, header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)


def write_members(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            add(archive, name, content)


def write_twice(path):
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            add(archive, "a.latent.npy", npy(random(1, 1, 1)))


def write_link(path):
    write_tar(path, {"a.latent": random(4, 2, 2)})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("b.latent.npy")
        member.type, member.linkname = tarfile.LNKTYPE, "a.latent.npy"
        archive.addfile(member)


def write_damaged_in_the_middle(path):
    write_tar(path, {f"{number}.latent": random(4, 2, 2) for number in range(3)})
    content = bytearray(path.read_bytes())
    content[1024 : 1024 + 512] = b"x" * 512  # the second member's header
    path.write_bytes(content)


def write_appended(path):
    write_tar(path, {"a.latent": random(4, 2, 2)})
    path.write_bytes(path.read_bytes() * 2)


LATENT = {"a.latent": random(2, 4, 2, 2)}
ENTRY = {"dtype": "F32", "shape": [1, 1, 1], "data_offsets": [0, 4]}
BAD_FILES = {
    "empty.safetensors": (lambda path: path.write_bytes(b""), "not a safetensors file"),
    "text.safetensors": (lambda path: path.write_text("no tensors at all " * 9), "not a safetensors file"),
    "short.safetensors": (lambda path: cut(write_safetensors(path, LATENT), 60), "cut off"),
    "data.safetensors": (lambda path: cut(write_safetensors(path, LATENT), -1), "cut off"),
    "longer.safetensors": (lambda path: path.write_bytes(write_safetensors(path, LATENT).read_bytes() + b"x"), "cut off or da"),
    "twice.safetensors": (
        lambda path: write_header(
            path, f'{{"a.latent": {json.dumps(ENTRY)}, "a.latent": {json.dumps(ENTRY)}}}'.encode(), bytes(4)
        ),
        "'a.latent' twice",
    ),
    "sizes.safetensors": (
        lambda path: write_header(path, {"a.latent": ENTRY | {"shape": [2, 1, 1]}}, bytes(4)),
        "does not fill",
    ),
    "negative.safetensors": (
        lambda path: write_header(path, {"a.latent": ENTRY | {"shape": [1, -1, -1]}}, bytes(4)),
        "cannot have",
    ),
    "entry.safetensors": (lambda path: write_header(path, {"a.latent": 3}), "its header says 3"),
    "list.safetensors": (lambda path: write_header(path, [1, 2]), "not a JSON object"),
    "deep.safetensors": (lambda path: write_header(path, b"[" * 100_000), "not JSON"),
    "nothing.safetensors": (lambda path: write_header(path, {}), "has no latents"),
    "other.safetensors": (lambda path: write_safetensors(path, {"weight": random(3)}), "holds ['weight'], not NAME.latent"),
    "text_only.safetensors": (lambda path: write_safetensors(path, {"a.text": random(2, 8)}), "no latent for sample 'a'"),
    "mask_only.safetensors": (
        lambda path: write_safetensors(path, LATENT | {"a.mask": torch.ones(2, dtype=torch.bool)}),
        "a mask and no text",
    ),
    "five.safetensors": (lambda path: write_safetensors(path, {"a.latent": random(1, 2, 4, 2, 2)}), "[1, 2, 4, 2, 2]"),
    "hollow.safetensors": (lambda path: write_safetensors(path, {"a.latent": random(0, 4, 2, 2)}), "empty latent"),
    "double.safetensors": (
        lambda path: write_safetensors(path, {"a.latent": random(4, 2, 2, dtype=torch.float64)}),
        "dtype F64",
    ),
    "pixels.safetensors": (lambda path: write_safetensors(path, {"a.latent": torch.ones(4, 2, 2, dtype=torch.uint8)}), "uint8"),
    "batched.safetensors": (lambda path: write_safetensors(path, LATENT | {"a.text": random(1, 2, 8)}), "[tokens, width]"),
    "width.safetensors": (lambda path: write_safetensors(path, LATENT | {"a.text": random(2, 9)}), "width 9 .* must be 8"),
    "length.safetensors": (
        lambda path: write_safetensors(path, LATENT | {"a.text": random(2, 8), "a.mask": torch.tensor([2])}),
        "mask of 1 tokens and a text of 2",
    ),
    "floats.safetensors": (
        lambda path: write_safetensors(path, LATENT | {"a.text": random(2, 8), "a.mask": torch.ones(2)}),
        "mask of dtype torch.float32",
    ),
    "empty.tar": (lambda path: path.write_bytes(b""), "empty"),
    "text.tar": (lambda path: path.write_text("no tar at all " * 99), "header"),
    "data.tar": (lambda path: cut(write_tar(path, LATENT), 700), "cut off in 'a.latent.npy'"),
    "between.tar": (lambda path: cut(write_tar(path, LATENT), 1024), "cut off or damaged after byte 1024"),
    "middle.tar": (write_damaged_in_the_middle, "cut off or damaged after byte 1024"),
    "appended.tar": (write_appended, "other tars are appended"),
    "nothing.tar": (lambda path: write_members(path, {"a.json": b"{}"}), "has no latents"),
    "link.tar": (write_link, "'b.latent.npy' is a link or a sparse file"),
    "twice.tar": (write_twice, "'a.latent' twice"),
    "objects.tar": (
        lambda path: write_members(path, {"a.latent.npy": npy(np.array([{}]), allow_pickle=True)}),
        "object, which is never unpickled",
    ),
    "big_endian.tar": (lambda path: write_members(path, {"a.latent.npy": npy(np.ones((4, 2, 2), ">f4"))}), "dtype >f4"),
    "no_array.tar": (lambda path: write_members(path, {"a.latent.npy": b"no array"}), "'a.latent.npy' is not an .npy"),
    "cut_array.tar": (lambda path: write_members(path, {"a.latent.npy": npy(random(4, 2, 2))[:-1]}), "does not fill"),
    "inner.tar": (lambda path: write_members(path, {"a.safetensors": b"nothing"}), "'a.safetensors' is not a safetensors"),
    "a.tar.gz": (lambda path: tarfile.open(path, "w:gz").close(), "compressed"),
    "a.tgz": (lambda path: tarfile.open(path, "w:gz").close(), "compressed"),
    "zipped.tar": (lambda path: tarfile.open(path, "w:gz").close(), "not a gzip|header|uncompressed"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_and_skipped_or_refused(tmp_path, caplog, name):
    write, reason = BAD_FILES[name]
    write_safetensors(tmp_path / "0_good.safetensors", TENSORS)
    write(tmp_path / name)
    with pytest.raises(DataError) as raised:
        LatentShards(tmp_path)
    message = str(raised.value)
    assert message.startswith(str(tmp_path / name))
    assert re.search(reason if "|" in reason or ".*" in reason else re.escape(reason), message), message
    assert message.endswith("repair it, remove it, or set on_bad_file to 'skip'")
    assert "\n" not in message
    shards = LatentShards(tmp_path, on_bad_file="skip")
    assert [shards.shape(index).frames for index in range(len(shards))] == [6, 5, 1]
    assert [str(tmp_path / name) in warning for warning in caplog.messages] == [True]


@pytest.mark.parametrize("name", WRITERS)
def test_random_damage_is_found_or_harmless(tmp_path, name):
    path = WRITERS[name](tmp_path / name, TENSORS)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        where = int(generator.integers(0, 1400))
        damaged[where : where + int(generator.integers(1, 9))] = generator.bytes(int(generator.integers(0, 9)))
        path.write_bytes(damaged)
        try:
            shards = LatentShards(tmp_path)
        except DataError:
            continue
        for index in range(len(shards)):
            assert shards.read(index, 0, shards.shape(index).frames).shape == shards.shape(index)


def test_folders_without_samples_are_refused(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(DataError, match=rf"{re.escape(str(folder))}: give a folder that holds \*.safetensors or \*.tar"):
            LatentShards(folder)
    with pytest.raises(DataError, match="latent_dims='THWC'"):
        LatentShards(tmp_path, latent_dims="THWC")
    with pytest.raises(DataError, match="on_bad_file='ignore'"):
        LatentShards(tmp_path, on_bad_file="ignore")


def test_samples_of_several_vaes_are_named(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"one.latent": random(3, 4, 2, 2)})
    write_safetensors(tmp_path / "b.safetensors", {"two.latent": random(3, 16, 2, 2)})
    with pytest.raises(
        DataError, match=r"b.safetensors: sample 'two' has 16 channels, and .*a.safetensors: sample 'one' has 4:"
    ):
        LatentShards(tmp_path, on_bad_file="skip")


def test_the_width_that_the_model_takes_decides(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", LATENT)
    assert LatentShards(tmp_path).conditioning_width == 1
    shards = LatentShards(tmp_path, conditioning_width=8)
    text, mask = shards.conditioning(0)
    assert text.shape == (1, 8)
    assert mask.tolist() == [False]
    write_safetensors(tmp_path / "b.safetensors", LATENT | {"a.text": random(2, 9)})
    with pytest.raises(DataError, match=r"b.safetensors has a text of width 9 for sample 'a': it must be 8"):
        LatentShards(tmp_path, conditioning_width=8)


def test_a_mask_of_lengths_is_refused_when_it_is_read(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", LATENT | {"a.text": random(2, 8), "a.mask": torch.tensor([2, 1])})
    with pytest.raises(DataError, match="sample 'a' has a mask with values other than 0 and 1"):
        LatentShards(tmp_path).conditioning(0)


def test_frames_outside_the_sample_are_refused(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", TENSORS)
    for start, stop in ((-1, 2), (3, 2), (0, 7)):
        with pytest.raises(ValueError, match=rf"frames {start} to {stop} are not in .*'clip.1', which has frames 0 to 6"):
            LatentShards(tmp_path).read(0, start, stop)


def test_a_file_that_changes_while_it_is_used_is_named(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS)
    shards = LatentShards(tmp_path)
    cut(path, -1)
    with pytest.raises(DataError, match=r"a.safetensors has changed since"):
        shards.read(0, 0, 1)
    write_safetensors(path, TENSORS)
    shards = LatentShards(tmp_path)
    shards.read(0, 0, 1)
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"a.safetensors was cut off while"):
        shards.read(0, 0, 1)


def read_all(shards):
    return [shards.read(index, 0, shards.shape(index).frames) for index in range(len(shards))]


def child_reads(shards, expected, answers):
    answers.put(all(torch.equal(part, other) for part, other in zip(read_all(shards), expected, strict=True)))


def test_many_files_threads_and_processes_at_once(tmp_path):
    for number in range(80):  # more than are kept open
        write_safetensors(tmp_path / f"{number:02}.safetensors", {"a.latent": random(2, 4, 4, 4, seed=number)})
    shards = LatentShards(tmp_path)
    expected = read_all(shards)
    assert [torch.equal(part, random(2, 4, 4, 4, seed=number)) for number, part in enumerate(expected)] == [True] * 80
    assert len(os.listdir("/proc/self/fd")) < 70, "few files are open"
    with ThreadPoolExecutor(8) as pool:
        for parts in pool.map(lambda _: read_all(shards), range(8)):
            assert all(torch.equal(part, other) for part, other in zip(parts, expected, strict=True))
    context = get_context("fork")
    answers = context.Queue()
    child = context.Process(target=child_reads, args=(shards, expected, answers))
    child.start()
    assert answers.get(timeout=60)
    child.join()
    assert all(
        torch.equal(part, other) for part, other in zip(read_all(pickle.loads(pickle.dumps(shards))), expected, strict=True)
    )


def test_the_script_of_the_docs_writes_such_a_shard(tmp_path, monkeypatch):
    scripts = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    (script,) = (script for script in scripts if "save_file" in script)
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    shards = LatentShards(tmp_path / "latents")
    assert [shards.shape(index) for index in range(2)] == [(13, 16, 30, 52), (1, 16, 64, 64)]
    assert [shards.conditioning(index)[1].sum() for index in range(2)] == [9, 9]
