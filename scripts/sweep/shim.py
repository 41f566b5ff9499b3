"""Stand-ins for the tiny models and tokenizers that diffusers' tests load from the hub: built on the spot, offline.

``install`` puts them in the place of ``from_pretrained``; a folder that exists loads as ever.
"""

import importlib
import os
import string
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' or 'image' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = (
    "{% for message in messages %}{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGETOKEN"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}"
)
LETTERS = string.ascii_letters + string.digits + string.punctuation
_QWEN_NAMES = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
_QWEN_NAMES += " vision_start vision_end vision_pad image_pad video_pad"
QWEN_SPECIALS = {f"<|{name}|>": 151643 + place for place, name in enumerate(_QWEN_NAMES.split())}


class NotBuilt(Exception):
    """No stand-in is known."""


def numbered(*tokens: str) -> dict[str, int]:
    return {token: place for place, token in enumerate(tokens)}


def of_bytes(first: int = 0) -> dict[str, int]:
    return {token: first + place for place, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def clip(model_max_length: int = 77) -> Any:
    symbols = [symbol for letter in LETTERS for symbol in (letter, letter + "</w>")]
    vocab = {symbol: place + 3 for place, symbol in enumerate(symbols)}
    vocab |= {"<pad>": 0, "<|startoftext|>": 998, "<|endoftext|>": 999}
    return tf.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)


def t5(model_max_length: int = 512) -> Any:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tf.T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=model_max_length)


def xlm_roberta(model_max_length: int = 77) -> Any:
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    vocab += [(letter, -3.0) for letter in LETTERS]
    return tf.XLMRobertaTokenizer(vocab=vocab, model_max_length=model_max_length)


def qwen(model_max_length: int = 32768) -> Any:
    specials = [name for name in QWEN_SPECIALS if name != "<|endoftext|>"]
    tokenizer = tf.Qwen2Tokenizer(
        vocab=of_bytes() | QWEN_SPECIALS,
        merges=[],
        model_max_length=model_max_length,
        additional_special_tokens=specials,
    )
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def gemma_of_8(model_max_length: int = 8192) -> Any:
    """hf-internal-testing/dummy-gemma: the encoders beside it know 8 tokens."""
    vocab = numbered("<pad>", "<eos>", "<bos>", "<unk>", "▁", "a", "e", "o")
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    made = tf.GemmaTokenizer(tokenizer_object=tokenizer, mask_token=None, model_max_length=model_max_length)
    made.chat_template = CHAT
    return made


def gemma(model_max_length: int = 8192) -> Any:
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    vocab = numbered(*specials, "▁", "\n", *LETTERS)
    tokenizer = tf.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)
    tokenizer.chat_template = CHAT
    return tokenizer


def llama(model_max_length: int = 2048) -> Any:
    specials = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<image>"]
    specials += ["<|begin▁of▁text|>"]
    vocab = numbered("<unk>", "<s>", "</s>", "<pad>", "▁", "\n", *LETTERS)
    vocab |= {special: len(vocab) + place for place, special in enumerate(specials)}
    tokenizer = tf.LlamaTokenizer(
        vocab=vocab,
        merges=[],
        pad_token="<pad>",
        model_max_length=model_max_length,
        additional_special_tokens=specials,
    )
    begun = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # no prompt is of no tokens
    tokenizer.backend_tokenizer.post_processor = begun
    tokenizer.chat_template = CHAT
    return tokenizer


def bert(model_max_length: int = 512) -> Any:
    vocab = numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS))
    return tf.BertTokenizer(vocab=vocab, model_max_length=model_max_length)


def roberta(model_max_length: int = 77) -> Any:
    vocab = numbered("<s>", "<pad>", "</s>", "<unk>", "<mask>") | of_bytes(5)
    return tf.RobertaTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)


def glm(model_max_length: int = 1024) -> Any:
    vocab = of_bytes() | {"<|endoftext|>": 300, "[gMASK]": 301, "<sop>": 302}
    specials = ["[gMASK]", "<sop>"]
    tokenizer = tf.Qwen2Tokenizer(
        vocab=vocab, merges=[], model_max_length=model_max_length, additional_special_tokens=specials
    )
    tokenizer.chat_template = CHAT
    tokenizer.padding_side = "left"
    return tokenizer


# By a part of the name or of the class; the first that is found.
TOKENIZERS: dict[str, Callable[..., Any]] = {
    "mclip": xlm_roberta,
    "xlmroberta": xlm_roberta,
    "clip": clip,
    "dummy-gemma": gemma_of_8,
    "gemma": gemma,
    "t5": t5,
    "cosmos3": qwen,
    "qwen": qwen,
    "roberta": roberta,
    "bert": bert,
    "glm-4": glm,
    "llama": llama,
    "hunya": llama,
}


def tokenizer_for(name: str, cls: str, **settings: Any) -> Any:
    for part, make in TOKENIZERS.items():
        if part in f"{name} {cls}".lower():
            return make(**settings)
    raise NotBuilt(f"no stand-in tokenizer for {name} ({cls})")


SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_hidden_layers": 2}


def t5_config() -> Any:
    return tf.T5Config(
        vocab_size=1103,
        d_model=32,
        d_ff=37,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        relative_attention_num_buckets=8,
        dropout_rate=0.1,
        decoder_start_token_id=0,
        is_encoder_decoder=False,
        use_cache=False,
    )


def umt5() -> Any:
    return tf.UMT5EncoderModel(
        tf.UMT5Config(vocab_size=1103, d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=2),
    )


def bert_model() -> Any:
    config = tf.BertConfig(vocab_size=1124, hidden_size=32, intermediate_size=37, max_position_embeddings=512, **HEADS)
    return tf.BertModel(config)


def siglip() -> Any:
    config = tf.SiglipVisionConfig(hidden_size=32, intermediate_size=37, image_size=30, patch_size=2, **HEADS)
    return tf.SiglipVisionModel(config)


def llama_model() -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=1000, num_attention_heads=4, num_key_value_heads=2, **SHAPE))


def gemma3() -> Any:
    text = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 64, "query_pre_attn_scalar": 8}
    vision = SHAPE | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = tf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=999,
        boi_token_index=997,
        eoi_token_index=998,
    )
    return tf.Gemma3ForConditionalGeneration(config)


def qwen_text() -> dict[str, Any]:
    rotary = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return SHAPE | heads | {"vocab_size": 152064, "rope_scaling": rotary, "rope_theta": 1e6}


def qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    tokens = {f"{name}_token_id": QWEN_SPECIALS[f"<|{name}_pad|>"] for name in ("image", "video")}
    config = tf.Qwen2VLConfig(text_config=qwen_text(), vision_config=vision, **tokens)
    return tf.Qwen2VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "patch_size": 16}
    tokens = {f"{name}_token_id": QWEN_SPECIALS[f"<|{name}_pad|>"] for name in ("image", "video")}
    tokens |= {f"vision_{name}_token_id": QWEN_SPECIALS[f"<|vision_{name}|>"] for name in ("start", "end")}
    config = tf.Qwen3VLConfig(text_config=qwen_text() | {"head_dim": 8}, vision_config=vision, **tokens)
    return tf.Qwen3VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "T5EncoderModel": lambda: tf.T5EncoderModel(t5_config()),
    "UMT5EncoderModel": umt5,
    "BertModel": bert_model,
    "LlamaForCausalLM": llama_model,
    "SiglipVisionModel": siglip,
    "Gemma3ForConditionalGeneration": gemma3,
    "Qwen2VLForConditionalGeneration": qwen2_vl,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
}


def model_for(name: str, cls: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    if cls == "ChatGLMModel":
        raise NotBuilt("ChatGLM's tokenizer needs its sentencepiece file")
    if cls not in MODELS:
        raise NotBuilt(f"no stand-in model for {name} ({cls})")
    return MODELS[cls]()


def mistral_processor() -> Any:
    tokenizer = llama()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    tokenizer.chat_template = CHAT.replace("IMAGETOKEN", "[IMG]")
    return tf.PixtralProcessor(
        image_processor=tf.PixtralImageProcessorFast(patch_size={"height": 6, "width": 6}, size={"longest_edge": 30}),
        tokenizer=tokenizer,
        patch_size=6,
        spatial_merge_size=1,
        chat_template=tokenizer.chat_template,
    )


def processor_for(name: str, cls: str, **settings: Any) -> Any:
    low = f"{name} {cls}".lower()
    if "qwen3vl" in cls.lower():
        which, video, side, sizes = (
            tf.Qwen3VLProcessor,
            tf.Qwen3VLVideoProcessor,
            32,
            {"patch_size": 16, "merge_size": 2},
        )
    elif "qwen2vl" in low or "qwen2_5" in low:
        which = tf.Qwen2_5_VLProcessor if "qwen2_5" in cls.lower() else tf.Qwen2VLProcessor
        video, side, sizes = tf.Qwen2VLVideoProcessor, 28, {}
    elif "mistral" in low:
        return mistral_processor()
    else:
        raise NotBuilt(f"no stand-in processor for {name} ({cls})")
    image = tf.Qwen2VLImageProcessorFast(min_pixels=side**2, max_pixels=(2 * side) ** 2, **sizes)
    return which(image_processor=image, tokenizer=qwen(), video_processor=video(), chat_template=QWEN_CHAT)


def image_processor_for(name: str, cls: str, **settings: Any) -> Any:
    if cls == "ClapFeatureExtractor":
        return tf.ClapFeatureExtractor(**settings)
    for start, side in (("Siglip", 30), ("DPT", 32)):
        if cls.startswith(start):
            return getattr(tf, cls)(size={"height": side, "width": side})
    raise NotBuilt(f"no stand-in image processor for {name} ({cls})")


def replace(owner: type, make: Callable[..., Any]) -> None:
    """Let ``owner.from_pretrained`` make a stand-in for what is no file or folder."""
    original = owner.__dict__["from_pretrained"].__func__

    def from_pretrained(cls: type, name: Any = None, *args: Any, **settings: Any) -> Any:
        place = str(settings.get("pretrained_model_name_or_path", "") if name is None else name)
        if os.path.exists(place):
            return original(cls, name, *args, **settings)
        kept = {key: settings[key] for key in ("model_max_length", "hop_length") if key in settings}
        return make(place, cls.__name__, **kept)

    owner.from_pretrained = classmethod(from_pretrained)


def install(small: bool = False) -> None:
    """Put the stand-ins in place, for the whole process.

    Args:
        small: Qwen's special tokens lie right behind the bytes, where a test sizes its encoder by their number.
    """
    if small:
        QWEN_SPECIALS.update({name: 256 + place for place, name in enumerate(QWEN_SPECIALS)})
    replace(tf.PreTrainedModel, model_for)
    for owner in (PreTrainedTokenizerBase, tf.AutoTokenizer):
        replace(owner, tokenizer_for)
    for owner in (tf.ProcessorMixin, tf.AutoProcessor):
        replace(owner, processor_for)
    for owner in (ImageProcessingMixin, FeatureExtractionMixin):
        replace(owner, image_processor_for)
    replace(tf.AutoConfig, lambda name, cls, **settings: t5_config())
    # Pictures to edit are made a million pixels whatever they were: here a 64th of it.
    for module in ("edit", "edit_plus", "edit_inpaint", "layered"):
        loaded = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{module}")
        if hasattr(loaded, "calculate_dimensions"):
            real = loaded.calculate_dimensions
            loaded.calculate_dimensions = lambda area, ratio, real=real: real(area / 64, ratio)
