"""Shapes of models: published parameter counts, config.json files, typical shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distui.core.errors import UserError
from distui.core.plan.models import load_model
from distui.core.plan.presets import PRESETS
from distui.core.plan.shapes import gpt

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-j-6b": 6_050_882_784,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "bloom-560m": 559_214_592,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3": 671_026_404_352,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-moe-16b": 16_375_728_128,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "bert-base": 109_514_298,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "vit-base": 86_567_656,
    "starcoder2-7b": 7_173_923_840,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-7b": 7_298_617_344,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
}
"""As the model cards and the tensors of the published checkpoints give them, tied weights once; of DeepSeek-V3 without
the 58 x 256 biases of its routers, which are buffers."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_exactly_the_published_number_of_parameters(name: str) -> None:
    assert load_model(name).num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_consistent(name: str) -> None:
    model = load_model(name)
    assert 0 < model.root_parameters < model.num_parameters
    assert model.num_layers * model.block_parameters + model.root_parameters == model.num_parameters
    assert model.head_parameters >= model.vocab_size * model.hidden_size
    assert model.sequence_length <= 8192
    assert name in model.source


def test_a_mixture_counts_active_parameters_apart() -> None:
    assert load_model("mixtral-8x7b").active_parameters == 12_879_925_248
    assert load_model("llama-7b").active_parameters == PUBLISHED["llama-7b"]


def test_names_are_read_kindly() -> None:
    assert load_model("meta-llama/Llama-2-7b").name == "llama-2-7b"
    assert load_model("GPT-J").name == "gpt-j-6b"
    assert load_model("llama-7b", 512).sequence_length == 512
    for name, preset in (
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("google-bert/bert-base-uncased", "bert-base"),
        ("google/vit-base-patch16-224", "vit-base"),
        ("deepseek-ai/DeepSeek-V2-Lite", "deepseek-v2-lite"),
    ):
        assert load_model(name).name == preset


@pytest.mark.parametrize(
    ("text", "fix"), [("lama-7b", "llama-7b"), ("qwen2.5-8b", "qwen2.5-"), ("zzzz", "config.json")]
)
def test_an_unknown_name_says_what_is_near(text: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(text)
    assert fix in caught.value.fix


@pytest.mark.parametrize("text", ["7B", "350M", "1.3b", "13B", "70B", "175B", "1T", "5m", "200k"])
def test_a_count_gets_a_typical_shape_with_exactly_that_many_parameters(text: str) -> None:
    model = load_model(text)
    scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[text[-1].lower()]
    assert model.num_parameters == round(float(text[:-1]) * scale)
    assert 0 < model.root_parameters < model.num_parameters
    assert model.hidden_size % model.num_heads == 0
    assert "typical shape" in model.source


def test_a_count_below_any_shape_is_refused() -> None:
    with pytest.raises(UserError, match="too few"):
        load_model("5k")


LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def test_a_config_json_gives_the_same_count_as_the_preset(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = load_model(str(tmp_path))
    assert model.num_parameters == PUBLISHED["llama-3-8b"]
    assert model.sequence_length == 4096, "a context of 128k is not what is trained on"
    assert load_model(str(tmp_path / "config.json"), 8192).sequence_length == 8192


def test_gpt2s_own_config_json(tmp_path: Path) -> None:
    values = {
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = load_model(str(tmp_path), 256)
    assert model.num_parameters == PUBLISHED["gpt2"], "positions stay 1024 whatever the sequence length"


def test_an_unknown_architecture_is_refused_with_the_ways_around(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "mixtrall"}))
    with pytest.raises(UserError, match="'mixtrall' are not known") as caught:
        load_model(str(tmp_path))
    assert "nearest is mixtral" in caught.value.why
    assert "--script" in caught.value.fix and "7B" in caught.value.fix
    (tmp_path / "config.json").write_text(json.dumps({key: LLAMA[key] for key in LLAMA if key != "model_type"}))
    with pytest.raises(UserError, match="names no model_type"):
        load_model(str(tmp_path))


def test_a_model_of_images_and_text_counts_its_language_model_and_says_so(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    model = load_model(str(tmp_path))
    assert model.num_parameters == 3_880_263_168
    assert "the language model of gemma3 alone" in model.source


@pytest.mark.parametrize("value", [-1, "many", 2.5, True])
def test_a_size_that_is_none_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"intermediate_size": value}))
    with pytest.raises(UserError, match="intermediate_size"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "cannot read"), ("[]", "no JSON object"), (json.dumps({"model_type": "llama"}), "hidden_size")],
)
def test_a_bad_config_json_says_what_is_missing(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=match):
        load_model(str(tmp_path))


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_model(str(tmp_path / "no.json"))


def test_a_small_gpt_is_counted_like_torch_counts_it() -> None:
    torch_count = 256 * 32 + 64 * 32  # token and position embeddings, tied output
    per_block = 2 * 2 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    torch_count += 2 * per_block + 2 * 32
    model = gpt("byte-gpt", num_layers=2, hidden_size=32, num_heads=2, vocab_size=256, sequence_length=64)
    assert model.num_parameters == torch_count
    assert model.block_parameters == per_block


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("llama-70b", "llama-3-70b"),
        ("llama3-8b", "llama-3-8b"),
        ("Llama 3 8B", "llama-3-8b"),
        ("llama_2_7b", "llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-3.1-405B", "llama-3.1-405b"),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "qwen2.5-7b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama-3-8b"),
        ("codellama/CodeLlama-7b-Python-hf", "llama-2-7b"),
        ("unsloth/llama-3-8b-bnb-4bit", "llama-3-8b"),
        ("google-bert/bert-base-uncased", "bert-base"),
    ],
)
def test_names_as_people_write_them_and_ids_of_hugging_face(written: str, meant: str) -> None:
    assert load_model(written).name == meant


def test_an_id_that_this_machine_has_downloaded_is_read_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub" / "models--ada--engine-1" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100, **sizes}))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert load_model("ada/engine-1").num_layers == 2
    with pytest.raises(UserError, match="no model is called"):
        load_model("ada/engine-2")
