"""Make the cases of this folder: a selection of a full set of recordings, whose folder is the only argument."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent

WHOLE = [
    "schedule_.*", "space_timesteps_.*", "sampling_plan_.*", "ddim_schedule_.*", "q_sample_.*", "timestep_embedding_.*",
    "struct_width20", "unet_32_features_given", r"unet_16_t\d+", "unet_16x40", "unet_short_context", "sub_.*",
    "posterior", "vae_encode_odd_100x76", "vae_decode_batch", "cfw_encode_64x48", "cfw_decode_.*",
    "tokenize", "text_encode",
    "tile_plan_.*", "gaussian_weights_16x16", "gaussian_weights_48x32", "blend_20x28",
    "chop_weights_64", "chop_plan_.*", "chop_blend_50x70",
    "p_sample_v_20_7", "p_sample_eps_cfg", "sample_v_4",
    "sample_canvas_batch2tiles", "sample_canvas_one_tile", "sample_canvas_cfg", "ddim_canvas_eps_noguide",
    "(wavelet|adain)_9x11", "adain_(flat|different_sizes|low_contrast)", "wavelet_decompose_37x53",
    "preprocess_shape_.*", "postprocess_14x12_small", "e2e_ddpm_24x20_small", "e2e_ddim_36x32", "train_loss_v",
]  # fmt: skip
"""Patterns of identifiers: at least one case of every operation, the small ones, and those that show an oddity."""

ONLY_SMALL_OUTPUTS = {"unet_trace_8": 4_000}
"""Cases of which only the outputs with at most so many numbers are kept."""

ONLY_FIRST_SAMPLE = {"unet_32_features_given"}
"""Cases of which only the first sample of the batch is kept; in evaluation the network never mixes samples."""


def selected(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen = []
    for case in cases:
        if any(re.fullmatch(pattern, case["id"]) for pattern in WHOLE):
            chosen.append(case)
        elif case["id"] in ONLY_SMALL_OUTPUTS:
            small = {
                name: output
                for name, output in case["outputs"].items()
                if np.prod(output["shape"]) <= ONLY_SMALL_OUTPUTS[case["id"]]
            }
            chosen.append(case | {"outputs": small})
    missing = {case["op"] for case in cases} - {case["op"] for case in chosen}
    if missing:
        raise SystemExit(f"no case of {sorted(missing)} is selected")
    return chosen


class Store:
    """The arrays that are kept, each once however many cases use it."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.arrays: dict[str, np.ndarray] = {}
        self.names: dict[tuple[Any, ...], str] = {}
        """Of the arrays, by what they hold."""

    def keep(self, case: dict[str, Any], key: str) -> str:
        with np.load(self.source / case["file"]) as recorded:
            array = recorded[key][:1] if case["id"] in ONLY_FIRST_SAMPLE else recorded[key]
        name = self.names.setdefault((array.shape, array.dtype.str, array.tobytes()), key)
        if self.arrays.setdefault(name, array).tobytes() != array.tobytes():
            raise SystemExit(f"two different arrays are called {name}")
        return name


def main(source: Path) -> None:
    index = json.loads((source / "index.json").read_text(encoding="utf-8"))
    store = Store(source)
    entries = []
    for case in selected(index["cases"]):
        inputs = {name: store.keep(case, key) for name, key in case["inputs"].items()}
        outputs = {
            name: {"key": store.keep(case, output["key"])}
            | {limit: output[limit] for limit in ("atol", "max_mismatch_fraction") if limit in output}
            for name, output in case["outputs"].items()
        }
        kept = {"id": case["id"], "op": case["op"], "params": case["params"], "file": "cases.npz"}
        entries.append(kept | {"inputs": inputs, "outputs": outputs})
    np.savez_compressed(HERE / "cases.npz", allow_pickle=False, **store.arrays)
    made, lines = json.dumps(index["produced_with"]), ",\n".join(json.dumps(entry) for entry in entries)
    index_text = f'{{"produced_with": {made}, "cases": [\n{lines}\n]}}\n'
    (HERE / "index.json").write_text(index_text, encoding="utf-8")
    config = json.loads((source / "tiny_config.json").read_text(encoding="utf-8"))
    (HERE / "tiny_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in HERE.iterdir())
    print(f"{len(entries)} of {len(index['cases'])} cases, {len(store.arrays)} arrays, {size / 1e6:.2f} MB in all")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
