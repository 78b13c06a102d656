"""What is wrong with a folder ends every command that opens it: one line that names it, and exit status 2."""

import json
import os
import shutil
import struct
import zipfile

import numpy as np
import pytest

from minimoe import cli
from tests import small
from tests.checkpoint.folders import edit_json, read_parts, write_parts

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "m")


def in_header(change):
    def damage(folder):
        header, data = read_parts(folder / SINGLE)
        change(header)
        write_parts(folder / SINGLE, header, data)

    return damage


def content(data):
    return lambda folder: (folder / SINGLE).write_bytes(data)


def config(**changes):
    return lambda folder: edit_json(folder / CONFIG, **changes)


def index(weight_map):
    def damage(folder):
        (folder / SINGLE).unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


def only(name, data=b"\x80\x04x"):
    def damage(folder):
        (folder / SINGLE).unlink()
        (folder / name).write_bytes(data)

    return damage


def zip_bomb(folder):
    with zipfile.ZipFile(folder / SINGLE, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.pkl", bytes(50_000_000))


def object_npz(folder):
    (folder / SINGLE).unlink()
    np.savez(folder / "weights.npz", x=np.array([{}], object))


def outside(name):
    def damage(folder):
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to("../outside")

    return damage


def duplicate_key(folder):
    header, data = read_parts(folder / SINGLE)
    text = json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'
    write_parts(folder / SINGLE, text.encode(), data)


def shift(by):
    def change(header):
        header[NORM]["data_offsets"] = [place + by for place in header[NORM]["data_offsets"]]

    return in_header(change)


DAMAGES = {
    "truncated": (lambda folder: os.truncate(folder / SINGLE, 9000), "truncated"),
    "empty": (content(b""), "the file is empty"),
    "a Git-LFS pointer": (content(b"version https://git-lfs.github.com/spec/v1\n"), "Git-LFS pointer"),
    "overlapping": (shift(-2), "overlap"),
    "a hole": (shift(2), "hole"),
    "a header of 100 MB": (content(struct.pack("<Q", 100_000_000) + b"{}"), "announce a header of 100,000,000 bytes"),
    "100,000 tensors": (content(struct.pack("<Q", 300_006) + b'{"a":' + b"{}," * 100_000 + b"1"), "50,000 tensors"),
    "a duplicate key": (duplicate_key, f"key {NORM} appears twice"),
    "an overflow": (in_header(lambda header: header[NORM].update(shape=[2**62] * 8)), "takes"),
    "a negative dimension": (in_header(lambda header: header[NORM].update(shape=[-16])), "shape must be"),
    "a name with path parts": (in_header(lambda header: header.update({"../../x": header.pop(NORM)})), "../../x"),
    "an index with ../": (index({NORM: "../x.safetensors"}), "not the plain name of a file"),
    "an index with an absolute path": (index({NORM: "/x.safetensors"}), "not the plain name of a file"),
    "a link that leaves": (outside(SINGLE), "leaves the folder"),
    "a config that is such a link": (outside(CONFIG), "leaves the folder"),
    "missing shards": (index({"a": "b.safetensors", NORM: "c.safetensors"}), "2 of 2 shards are missing"),
    "a missing tensor": (in_header(lambda header: header.update(x=header.pop(NORM))), f"missing (1): {NORM}"),
    "a transposed tensor": (
        in_header(lambda header: header["lm_head.weight"]["shape"].reverse()), "transposed (1): lm_head.weight",
    ),
    "FP8": (in_header(lambda header: header[NORM].update(dtype="F8_E4M3")), "F8_E4M3"),
    "an unknown type": (in_header(lambda header: header[NORM].update(dtype="Q3")), "Q3"),
    "a pickle": (only("pytorch_model.bin"), "never opened"),
    "a .pt": (only("x.pt"), "never opened"),
    "a pickle under our name": (content(b"\x80\x04" + b"x" * 100), "never opened"),
    "a zip bomb": (zip_bomb, "never opened"),
    "an object .npz": (object_npz, "found weights.npz"),
    "a config of the wrong type": (config(hidden_size="16"), "hidden_size must be an integer"),
    "k > E": (config(num_experts_per_tok=9), "exceeds num_local_experts"),
    "H % K": (config(num_key_value_heads=3), "must be a multiple of num_key_value_heads"),
    "a hidden size of 10^12": (config(hidden_size=10**12), "hidden_size must be an integer in"),
    "a NaN": (lambda folder: (folder / CONFIG).write_text('{"rms_norm_eps": NaN}'), "NaN is not a JSON number"),
    "an unknown rope type": (
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}), "only the rope_type default",
    ),
    "other mathematics": (config(attn_logit_softcapping=30.0), "mathematics that minimoe does not have"),
    "two configs that disagree": (
        lambda folder: (folder / "params.json").write_text(json.dumps({"dim": 8, "n_layers": 2, "vocab_size": 7})),
        "params.json",
    ),
    "a FIFO": (lambda folder: ((folder / SINGLE).unlink(), os.mkfifo(folder / SINGLE)), "not a regular file"),
    "a tokenizer that is none": (lambda folder: (folder / "tokenizer.model").write_bytes(b"x"), "not a SentencePiece"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_bad_folder_is_one_line_and_status_2(original, tmp_path, capsys, case):
    damage, words = DAMAGES[case]
    folder = shutil.copytree(original, tmp_path / "m")
    damage(folder)
    commands = [["generate", "a", "--backend", "numpy", "--model", str(folder)]]
    if "tokenizer" not in case:  # info reads none
        commands.append(["info", str(folder), "--verify"])
    for command in commands:
        status = cli.main(command)
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), err
        assert err.startswith("minimoe: error: ") and err.count("\n") == 1 and err[:-1].isprintable()
        assert words in err and str(folder) in err


def test_nan_and_inf_are_found_by_info_verify_and_status_1(original, tmp_path, capsys):
    folder = shutil.copytree(original, tmp_path / "m")
    header, data = read_parts(folder / SINGLE)
    begin = header[NORM]["data_offsets"][0]
    spoiled = bytearray(data)
    spoiled[begin : begin + 4] = b"\x80\x7f\xc0\x7f"  # Inf and NaN in bfloat16
    write_parts(folder / SINGLE, header, bytes(spoiled))
    assert cli.main(["info", str(folder), "--verify"]) == 1
    assert f"tensor {NORM} holds 1 NaN and 1 Inf, the first at [0]" in capsys.readouterr().out
