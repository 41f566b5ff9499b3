"""Write docs/inputs.md: every form of file that is taken, what is done with it, and the test that shows it.

python scripts/inputs_table.py            # --check: only say whether the page is up to date
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "inputs.md"
HEAD = """# File formats of prompts and images

Written by `python scripts/inputs_table.py`. Each row is exercised by the test that it names, in `tests/`. How to use
them: [your model](your-model.md) and [data](data.md).
"""

ONE, MANY = "pipeline/test_single_file.py", "pipeline/test_assemble.py"
OLD, PLACES = "pipeline/test_convert.py", "data/test_places.py"
FOLDER, SOURCES, PICTURE = "data/test_folder.py", "data/test_sources.py", "data/test_picture.py"
CLIPS, OF_CLIPS = "data/test_clips.py", "pipeline/test_clips_of_pipelines.py"

# section: (form, what is done with it, test)
ROWS: dict[str, list[tuple[str, str, str]]] = {
    "Pipelines": [
        (
            "folder in diffusers format",
            "loaded from its safetensors; what is not trained is copied to the byte into the export",
            "exporting/test_copied.py::test_what_was_not_trained_is_copied_to_the_byte",
        ),
        (
            "weights in several files with an index",
            "loaded and copied",
            "exporting/test_copied.py::test_variants_get_plain_names_and_stay_what_they_are",
        ),
        (
            "`teacher.variant: fp16`",
            "files of that variant are loaded; the export has plain names",
            f"{OLD}::test_variants_are_asked_for_by_name",
        ),
        (
            "pickled weights (`.bin`) in a folder",
            "refused; `stepdistill convert` makes safetensors of them",
            f"{OLD}::test_converted_weights_are_the_same",
        ),
        (
            "checkpoint file of Stable Diffusion 1",
            "read by diffusers with the configs of `teacher.config`, kept as a folder",
            f"{ONE}::test_an_sd_file_is_the_pipeline_that_it_was_made_of",
        ),
        ("checkpoint file of SDXL", "likewise", f"{ONE}::test_an_sdxl_file_too"),
        (
            "checkpoint file without `teacher.config`",
            "diffusers detects the model; its configs come from the hub or its cache",
            f"{ONE}::test_its_configs_are_found_in_the_hubs_cache",
        ),
        (
            "the same without network and cache",
            "refused with what to type",
            f"{ONE}::test_without_them_the_message_says_what_to_type",
        ),
        (
            "checkpoint file that lacks a text encoder or autoencoder",
            "taken from `teacher.config`, or from the hub",
            f"{ONE}::test_a_component_that_the_file_lacks_comes_from_the_config_with_weights",
        ),
        (
            "checkpoint file in half precision",
            "kept in half precision",
            f"{ONE}::test_half_precision_stays_in_the_folder_that_is_made",
        ),
        (
            "checkpoint file in fp8",
            "read; refused where factors lie beside the weights",
            f"{ONE}::test_weights_in_8_bits_are_read",
        ),
        (
            "`.ckpt`, `.pt`, `.bin` and other pickles as a checkpoint",
            "refused",
            f"{ONE}::test_pickles_are_read_neither_as_a_checkpoint_nor_from_the_config",
        ),
        (
            "checkpoint file that is cut short or none",
            "refused",
            f"{ONE}::test_files_that_are_no_checkpoint_or_not_whole_are_one_line",
        ),
        (
            "LoRA of diffusers, peft or kohya (`teacher.loras`)",
            "fused in float32 before tracing",
            f"{MANY}::test_a_lora_is_in_the_weights_at_its_scale",
        ),
        (
            "LoRA on a text encoder",
            "fused likewise",
            f"{MANY}::test_a_lora_may_be_on_the_text_encoder_too",
        ),
        (
            "LoRA with tensors that find no layer",
            "refused",
            f"{MANY}::test_a_lora_without_a_matching_layer_is_never_silent",
        ),
        (
            "autoencoder as folder, pipeline or file (`teacher.vae`)",
            "takes the place of the pipeline's",
            f"{MANY}::test_another_autoencoder_takes_the_place_of_the_own",
        ),
        (
            "autoencoder with other latents",
            "refused",
            f"{MANY}::test_an_autoencoder_of_other_latents_is_refused",
        ),
        (
            "textual inversion of diffusers or A1111 (`teacher.embeddings`)",
            "its token becomes a word of prompts",
            f"{MANY}::test_a_textual_inversion_is_a_word_of_prompts",
        ),
        (
            "textual inversion of SDXL",
            "likewise, a vector for each encoder",
            f"{MANY}::test_sdxls_have_a_vector_for_each_encoder",
        ),
    ],
    "Sources of samples": [
        (
            "`prompts.txt`, also at a URL or by a pattern",
            "a prompt a line",
            f"{PLACES}::test_prompts_may_be_at_a_url_or_in_several_files",
        ),
        (
            "folder of pictures with `.txt`, `.caption` or `.json`",
            "a sample a picture; captions beside it, or in a folder of captions",
            f"{FOLDER}::test_captions_lie_beside_their_pictures",
        ),
        (
            "folder of pictures by class",
            "the subfolder's name is the caption",
            f"{FOLDER}::test_captions_from_folder_names_are_said",
        ),
        (
            "kohya's `N_name/`",
            "repeated in the proportions of N",
            f"{FOLDER}::test_kohyas_repeats_are_proportions_of_the_pictures",
        ),
        (
            "`.jsonl`, `metadata.jsonl` of a folder",
            "a sample a line",
            f"{SOURCES}::test_every_source_gives_the_same",
        ),
        ("`.csv`, `.tsv`", "a sample a row", f"{PLACES}::test_a_table_names_captions_and_pictures"),
        ("`metadata.csv` of a folder", "likewise", f"{PLACES}::test_metadata_csv_speaks_for_its_folder"),
        (
            "webdataset's `.tar`, a folder of them",
            "read member by member, never unpacked",
            f"{SOURCES}::test_every_source_gives_the_same",
        ),
        ("`.tar.gz`, `.tgz`", "likewise", f"{PLACES}::test_compressed_shards_are_read"),
        (
            "`.parquet`, `.arrow`, `save_to_disk`",
            "streamed by `datasets`",
            f"{SOURCES}::test_every_source_gives_the_same",
        ),
        (
            "clone of a hub dataset (`data/train-*.parquet`)",
            "its split for training",
            f"{PLACES}::test_a_clone_of_a_dataset_gives_its_split_for_training",
        ),
        ("shards in subfolders", "likewise", f"{PLACES}::test_shards_in_subfolders_are_found"),
        (
            "`hub:OWNER/NAME[:SPLIT]`",
            "streamed by `datasets`",
            f"{SOURCES}::test_datasets_of_the_hub_are_streamed",
        ),
        (
            "a pattern: `{000..012}.tar`, `*.parquet`",
            "every file, in order",
            f"{PLACES}::test_shards_are_named_by_a_pattern",
        ),
        (
            "any of these at a URL (`s3://`, `gs://`, `hf://`, `https://`, ...)",
            "opened by fsspec; folders where its file system lists",
            f"{PLACES}::test_every_source_can_be_at_a_url",
        ),
        (
            "a URL whose package is missing",
            "refused with the package's name",
            f"{PLACES}::test_a_url_without_its_package_is_one_line_with_the_key",
        ),
        (
            "paths and URLs of pictures in JSON, tables and columns",
            "opened; what cannot be is rejected",
            f"{PLACES}::test_pictures_may_be_at_urls_themselves",
        ),
        ("a column of bytes", "a picture", f"{PLACES}::test_a_column_of_bytes_is_a_picture"),
        (
            "a shard that is cut short",
            "refused",
            f"{SOURCES}::test_a_shard_that_is_cut_short_is_named",
        ),
        (
            "links, devices and outside names in a shard",
            "rejected",
            f"{SOURCES}::test_members_that_lead_out_of_a_shard_are_refused",
        ),
    ],
    "Pictures": [
        (
            "`.png`, `.jpg`, `.webp`, `.bmp`, `.gif`, `.tiff`, `.avif`, ...",
            "read",
            f"{FOLDER}::test_every_picture_is_read",
        ),
        ("`.heic`, `.jxl`, `.svg`, raw files", "rejected", f"{FOLDER}::test_or_counted"),
        ("EXIF orientation", "turned upright", f"{PICTURE}::test_target_and_control_are_both_upright"),
        ("16 bits a channel", "scaled to 8 bits", f"{PICTURE}::test_a_ramp_of_16_bits_stays_a_ramp"),
        (
            "32-bit and floating-point pixels",
            "rejected",
            f"{PICTURE}::test_numbers_without_a_range_are_refused",
        ),
        ("transparent parts", "put on white", f"{PICTURE}::test_a_colour_under_alpha_0_is_not_trained"),
        ("palette, CMYK, YCbCr, grey, 1 bit", "converted", f"{PICTURE}::test_other_modes_are_converted_as_before"),
        ("animation", "its first frame", f"{PICTURE}::test_of_an_animation_the_first_frame_is_taken"),
        (
            "damaged or cut short",
            "rejected, whatever Pillow raises",
            f"{PICTURE}::test_damaged_pictures_are_rejected_and_end_nothing",
        ),
    ],
    "Videos, sounds and latents": [
        (
            "`.mp4`, `.m4v`, `.mov`, `.webm`, `.mkv`, `.avi`, animated pictures",
            "as many frames as the pipeline makes, of the file's rate or at `data.frame_rate`",
            f"{CLIPS}::test_frames_at_the_file_s_rate_and_at_another",
        ),
        ("a video that is too short", "rejected", f"{CLIPS}::test_a_video_that_ends_before_is_short"),
        (
            "videos of other proportions",
            "cut in the middle, or sent to the nearest of `data.buckets`",
            f"{CLIPS}::test_videos_go_to_buckets_by_their_proportions",
        ),
        (
            "`.wav`, `.flac`, `.mp3`, `.ogg`, `.opus`, `.m4a`",
            "resampled to the pipeline's rate and channels; a part as long as it makes",
            f"{CLIPS}::test_sounds_are_brought_to_the_rate_and_the_channels",
        ),
        ("any of them in shards", "read member by member", f"{CLIPS}::test_sounds_in_shards"),
        (
            "`.safetensors` with a tensor `latents`",
            "latents of the autoencoder that were made ahead; they are scaled and packed as the denoiser takes them",
            f"{OF_CLIPS}::test_sounds_are_encoded_and_latents_made_ahead_are_taken_as_they_are",
        ),
    ],
}


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for section, rows in ROWS.items():
        lines += [f"## {section}", "", "| file | what is done with it | test |", "|---|---|---|"]
        lines += [f"| {form} | {treatment} | `{test}` |" for form, treatment, test in rows]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def missing() -> Iterator[str]:
    """Tests that rows name and that are not there."""
    for _, _, test in (row for rows in ROWS.values() for row in rows):
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            yield test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    wanted = page()
    if parser.parse_args().check:
        written = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
        if written != wanted:
            print(f"{PAGE} is out of date: run python scripts/inputs_table.py", file=sys.stderr)
        return int(written != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
