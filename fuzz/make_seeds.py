#!/usr/bin/env python3
"""fuzz/make_seeds.py: makes fuzz/corpus/ anew from traces/ and the generators of tests/hostile.py.

The seeds are committed; this is how they came to be. The same traces give the same bytes. Prints
files and bytes of each target. Files of fuzz/regressions/ are not touched. Python's standard
library only. Not verified here: that a seed is accepted; fuzz/replay_test.cc reads every one.
"""

import hashlib
import io
import json
import shutil
import struct
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRACES = HERE.parent / "traces" / "deepspeed"
sys.path.insert(0, str(HERE.parent / "tests"))
sys.dont_write_bytecode = True
import hostile as h  # noqa: E402

MOST_BYTES = 400 * 1024

DATA = h.floats(4)
GOOD = h.weights([("w", h.tensor())])
BASE = h.records_of(GOOD, [DATA])


def data_pkl(path):
    return h.split_zip(path)[1]["data.pkl"]


def recorded(case, *parts):
    return TRACES.joinpath(case, *parts)


# ---- one function a target: name → bytes ---------------------------------------------------------


def one_changed(**tricks):
    place = [name for name, _ in BASE].index("archive/data/0")
    records = list(BASE)
    records[place] = h.Record(records[place][0], DATA, **tricks)
    return h.torch_zip(records)


def by_zipfile(names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), b"x" * len(name))
    return out.getvalue()


def zip_seeds():
    real = sorted(recorded("z1_bf16_dp2").rglob("step.pt"))[0]
    plain = h.torch_zip(BASE)
    return {
        "recorded_step": real.read_bytes(),
        "sound": plain,
        "no_records": h.torch_zip([]),
        "one_record": h.torch_zip([("a/b", b"x")]),
        "empty_record": h.torch_zip([("a/b", b""), ("a/c", b"y")]),
        "without_zip64": h.torch_zip(BASE, end64=False),
        "python": by_zipfile(["a/b", "a/data/0"]),
        "python_not_ascii": by_zipfile(["a/\u00e9"]),
        "duplicate": h.torch_zip(BASE + [("archive/data/0", DATA)]),
        "overlap": one_changed(offset=0),
        "wrong_crc": one_changed(crc=1),
        "deflated": one_changed(method=8),
        "encrypted": one_changed(flags=0x0809),
        "no_descriptor": one_changed(flags=0x0800),
        "other_name": one_changed(local_name="archive/data/1"),
        "large_size": one_changed(central_size=2**31),
        "prefixed": h.torch_zip(BASE, before=b"MZ" + bytes(62)),
        "trailing": plain + b"x",
        "comment": h.torch_zip(BASE, comment=b"hello"),
        "many_records": h.torch_zip(BASE, count=2**40),
        "parent_folder": h.torch_zip(BASE + [("archive/../x", b"x")]),
    }


def described(records, edits=()):
    out = bytes([len(records)])
    for name, data in records:
        out += bytes([len(name)]) + name.encode() + struct.pack("<H", len(data)) + data
    for place, change in edits:
        out += struct.pack("<I", place)[:3] + bytes([change])
    return out


def zip_records_seeds():
    few = [("a/b", b"x"), ("a/data/0", DATA)]
    seeds = {"few": described(few), "torch": described(BASE), "none": described([])}
    for place in (0, 5, 10, 20, 30, 50, 90, 100, 120, 140, 160):
        seeds[f"edited_{place}"] = described(few, [(place, 1)])
    return seeds


def pickle_seeds():
    seeds = {
        "empty_dict": h.program(b"}"),
        "tensor": GOOD,
        "dag": h.program(h.dag(12)),
        "deep": h.program(b")" + b"\x85" * 900),
        "cycle": h.program(b"]q\x00h\x00a"),
        "long": h.program(h.integer(2**80)),
        "negative_long": h.program(h.integer(-(2**40))),
        "float": h.program(b"G" + struct.pack(">d", 1.5)),
        "newobj": h.program(h.name("a", "B") + b")\x81}b"),
        "os_system": h.evil_pickle("true"),
        "dict_subclass": h.program(
            h.call("collections", "OrderedDict") + b"(" + h.text("a") + b"K\x01u"
        ),
        "memo": h.program(b"}q\x00" + h.text("a") + b"q\x01h\x01s"),
        "memo_sparse": h.program(b"}r\xff\xff\xff\xff"),
        "keys_twice": h.weights([("w", b"N"), ("w", b"N")]),
        "set_items": h.program(h.mapping([(h.text("a"), h.integer(70000)), (b"K\x01", b"\x88")])),
    }
    for case, name in (
        ("z1_bf16_dp2", "mp_rank_00_model_states.pt"),
        ("z1_bf16_dp2", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("z1_fp16_dp2", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("z3_bf16_dp3", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("moe_z1_ep2_dp4", "layer_0_expert_0_mp_rank_00_model_states.pt"),
    ):
        for path in sorted(recorded(case, "ckpt").rglob(name)):
            seeds[f"{case}_{name.split('_')[0]}_{path.stem[-12:]}"] = data_pkl(path)
    return seeds


def torch_file_seeds():
    view = h.tensor
    tensors = {
        "strided": view((2, 2), (2, 1)),
        "transposed": view((2, 2), (1, 2)),
        "expanded": view((2**20,), (0,)),
        "scalar": view((), ()),
        "empty": view((0, 4), (4, 1)),
        "offset": view((2,), (1,), offset=2),
        "beyond": view((5,), (1,)),
        "overflow": view((4,), (2**62,)),
        "negative": view((4,), (-1,), offset=3),
        "bfloat16": view((4,), (1,), kind="BFloat16Storage"),
        "complex": view((4,), (1,), kind="ComplexDoubleStorage"),
        "untyped": view((4,), (1,), kind="UntypedStorage", module="torch.storage"),
        "parameter": h.call(
            "torch._utils",
            "_rebuild_parameter",
            view(),
            b"\x88",
            h.call("collections", "OrderedDict"),
        ),
        "sparse": h.call("torch._utils", "_rebuild_sparse_tensor", b"N", b")"),
        "quantised": h.call(
            "torch._utils", "_rebuild_qtensor", h.storage(), h.integer(0), b")", b")"
        ),
    }
    seeds = {name: b"\x01" + h.weights([("w", body)]) for name, body in tensors.items()}
    seeds["two_tensors"] = b"\x01" + h.weights([("a", view()), ("b", view(key="1", numel=9))])
    seeds["described_twice"] = b"\x01" + h.weights([("a", view()), ("b", view(kind="IntStorage"))])
    seeds["archive"] = b"\x00" + h.torch_file(GOOD, [DATA])
    seeds["half_a_record"] = b"\x00" + h.torch_file(GOOD, [DATA[:8]])
    seeds["big_endian"] = b"\x00" + h.torch_file(GOOD, [DATA], byteorder=b"big")
    for name in ("optim_states", "model_states"):
        path = sorted(recorded("z3_bf16_dp3", "ckpt").rglob(f"*rank_0*{name}.pt"))[0]
        seeds[f"recorded_{name}"] = b"\x01" + data_pkl(path)
    path = sorted(recorded("z1_bf16_dp2", "universal").rglob("fp32.pt"))[0]
    seeds["recorded_universal"] = b"\x01" + data_pkl(path)
    return seeds


def tensor_entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_seeds():
    def made(header, data=b""):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return b"\x01" + text + b"\x00" + data

    two = {"a": tensor_entry(0, 16, [4]), "b": tensor_entry(16, 24, [2, 2], "BF16")}
    real = recorded("trainer_z2_dp2", "ckpt", "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", real[:8])
    return {
        "two": made(two, bytes(24)),
        "metadata": made({"__metadata__": {"format": "pt", "alias:c": "a"}, **two}, bytes(24)),
        "empty_tensor": made({"a": tensor_entry(0, 0, [0, 3])}),
        "scalar": made({"a": tensor_entry(0, 8, [], "I64")}, bytes(8)),
        "no_tensors": made({}),
        "hole": made({"a": tensor_entry(4, 20, [4])}, bytes(20)),
        "overlap": made({"a": tensor_entry(0, 16, [4]), "b": tensor_entry(8, 24, [4])}, bytes(24)),
        "key_twice": made(b'{"a":1,"a":2}'),
        "wrap": made({"a": tensor_entry(0, 0, [2**62, 4])}),
        "float_shape": made({"a": tensor_entry(0, 16, [4.0])}, bytes(16)),
        "deep": made(b"[" * 200 + b"]" * 200),
        "fp8": made({"a": tensor_entry(0, 4, [4], "F8_E4M3")}, bytes(4)),
        "raw": b"\x00" + h.safetensors(two, bytes(24)),
        "raw_long": b"\x00" + h.safetensors(two, bytes(24), length=2**40),
        "recorded_header": b"\x01" + real[8 : 8 + length][:4000],
    }


def manifest_text(files, version="0.1.0"):
    value = {
        "files": [{"hash": hash_, "path": path, "size_bytes": size} for path, size, hash_ in files],
        "kind": "isoshard-manifest",
        "program_version": version,
        "schema": 1,
    }

    def dumped():
        return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    value["self_hash"] = "sha256:" + hashlib.sha256(dumped().encode()).hexdigest()
    return dumped().encode()


def manifest_seeds():
    two = [("a.pt", 16, "crc64x2:00ff"), ("zero/b.pt", 0, "sha256:" + "0" * 64)]
    sound = manifest_text(two)
    return {
        "two_files": sound,
        "no_files": manifest_text([]),
        "unicode": manifest_text([("\u00e9/\u4e2d.pt", 1, "a:0")]),
        "unsafe": manifest_text([("../a", 1, "a:0")]),
        "not_sorted": manifest_text(two[::-1]),
        "wrong_seal": sound.replace(b'"sha256:', b'"sha256:0', 1),
        "key_twice": sound.replace(b' "kind"', b' "kind": "",\n "kind"'),
        "deep": b"[" * 200,
        "large_number": sound.replace(b": 16", b": 18446744073709551615"),
    }


def tree(files):
    """[(path, kind, content)] → the bytes that folder_tree reads."""
    out = b""
    for path, kind, content in files:
        name = path.encode()
        if len(name) > 255 or len(content) > 65535:
            continue
        out += bytes([kind, len(name)]) + name + struct.pack("<H", len(content)) + content
    return out


def recorded_tree(case, folder):
    files, source = [], recorded(case, folder)
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        inside = str(path.relative_to(source))
        if path.suffix in (".pt", ".bin"):
            files.append((inside, 1, data_pkl(path)))
        elif path.name.startswith("latest"):
            files.append((inside, 0, path.read_bytes()))
    return tree(files)


def folder_tree_seeds():
    seeds = {
        case: recorded_tree(case, "ckpt")
        for case in (
            "z0_bf16_dp2",
            "z1_bf16_dp2",
            "z1_never_stepped_dp2",
            "z2_rr_dp3",
            "z2_sgdm_dp2",
            "z3_bf16_dp3",
            "z3_fp32_dp2_subgroups",
            "moe_z2_ep2_dp2",
            "moe_z0_ep2_dp4",
            "pipe_z1_pp2_dp1",
            "pipe_z0_bf16_pp2_dp2",
            "sp2_z1_dp2",
            "autoep_z1_ep2_dp2",
            "autotp_z1_tp2_dp1",
        )
    }
    seeds["universal_z1"] = recorded_tree("z1_bf16_dp2", "universal")
    seeds["universal_z3"] = recorded_tree("z3_bf16_dp3", "universal")
    seeds["universal_pipe"] = recorded_tree("pipe_z1_pp2_dp1", "universal")
    seeds["fp32"] = recorded_tree("z1_bf16_dp2", "fp32")
    part = h.safetensors({"a": tensor_entry(0, 16, [4])}, bytes(16))
    other = h.safetensors({"b": tensor_entry(0, 16, [4])}, bytes(16))
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.dumps({"weight_map": dict(zip("ab", names))}).encode()
    certificate = json.dumps(
        {"buffers": ["b"], "forced": ["x"], "target": {"digests": {"weights": "iso1:00"}}}
    ).encode()
    parts = [(names[0], 0, part), (names[1], 0, other)]
    seeds["two_parts"] = tree(parts + [("model.safetensors.index.json", 0, index)])
    seeds["certified"] = tree(parts + [("certificate.json", 3, certificate)])
    seeds["part_missing"] = tree(parts[:1] + [("model.safetensors.index.json", 0, index)])
    seeds["sealed"] = tree([("pytorch_model.bin", 2, GOOD)])
    seeds["sharded_bin"] = tree(
        [
            ("pytorch_model-00001-of-00002.bin", 1, GOOD),
            ("pytorch_model-00002-of-00002.bin", 1, h.weights([("v", h.tensor())])),
        ]
    )
    seeds["latest_alone"] = tree([("latest", 0, b"../x")])
    return seeds


def shallow_json_seeds():
    trainer = recorded("trainer_z2_dp2", "ckpt")
    return {
        "config": (trainer / "config.json").read_bytes()[:4096],
        "generation_config": (trainer / "generation_config.json").read_bytes()[:4096],
        "numbers": b"[0,-1,1.5,1e300,18446744073709551615,-9223372036854775808,1e999]",
        "texts": '["\\u00e9\\ud83d\\ude00","\\n","\u4e2d"]'.encode(),
        "nested": b'{"a":{"b":[{"c":null},true,false]}}',
        "levels_64": b"[" * 64 + b"]" * 64,
        "levels_65": b"[" * 65 + b"]" * 65,
        "key_twice": b'{"a":1,"a":2}',
        "key_twice_below": b'[{"b":{"c":1,"c":1}}]',
        "bare": b'"x"',
        "cut": b'{"a":[1,',
        "not_utf8": b'["\xff"]',
        "surrogate": b'["\\ud800"]',
        "objects": b"[" + b"{}," * 300 + b"{}]",
        "names": b'{"experts":[{"from":"a.{e}","to":"b.{e}","also":[]}],"names":[],"note":""}',
    }


def topology_seeds():
    texts = (
        "dp=4,sp=2,stage=3", "dp=2", "dp=2,tp=2,pp=2,ep=2", "dp=1000000,sp=1000000", "stage=4",
        "world<=8", "ulysses", "dense dp=2,sp=4", "awkward expert", "pipeline.pp2", "dp=2,dp=2",
        "world<=64", "dp=-1", "=", ",", " ", "ulysses.dp2.sp4", "dp=4096", "xx=1",
    )  # fmt: skip
    return {f"text_{number:02}": text.encode() for number, text in enumerate(texts)}


TARGETS = {
    "folder_tree": folder_tree_seeds,
    "manifest": manifest_seeds,
    "pickle": pickle_seeds,
    "safetensors": safetensors_seeds,
    "shallow_json": shallow_json_seeds,
    "topology": topology_seeds,
    "torch_file": torch_file_seeds,
    "zip": zip_seeds,
    "zip_records": zip_records_seeds,
}


def main():
    total = 0
    for target, make in TARGETS.items():
        folder = HERE / "corpus" / target
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        sizes = []
        for name, content in make().items():
            (folder / name).write_bytes(content)
            sizes.append(len(content))
        total += sum(sizes)
        print(f"{target:14} {len(sizes):3} files {sum(sizes):7} bytes, largest {max(sizes)}")
    print(f"{'all':14} {total} bytes")
    if total > MOST_BYTES:
        sys.exit(f"make_seeds: more than {MOST_BYTES} bytes")


if __name__ == "__main__":
    main()
