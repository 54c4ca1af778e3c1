"""BLIP, GIT and CoCa, small and of random weights, written in exactly the files that their makers publish; and a GIT that was taught the
colours of `tiny_captioner`."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_captioner as tiny
import torch
from safetensors.torch import save_file

SIDE = 64
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": SIDE, "patch_size": 16}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, which all three use


def scattered(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that captions depend on the picture."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def written(folder: Path, model, processor: dict) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": MEAN, "image_std": STD}))
    tiny.tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def blip(folder: Path) -> Path:
    from transformers import BlipConfig, BlipForConditionalGeneration

    words = tiny.tokenizer()
    pieces = words.get_vocab_size()
    text = SIZES | {"encoder_hidden_size": 32, "vocab_size": pieces + 2, "bos_token_id": pieces, "sep_token_id": words.token_to_id("[SEP]"),
                    "pad_token_id": words.token_to_id("[PAD]")}  # the start, [DEC], stands behind BERT's pieces
    model = scattered(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION)))
    return written(folder, model, {"image_processor_type": "BlipImageProcessor", "size": {"height": SIDE, "width": SIDE}})


def new_git():
    from transformers import GitConfig, GitForCausalLM

    words = tiny.tokenizer()
    start, end, pad = (words.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]"))
    torch.manual_seed(5)
    return GitForCausalLM(GitConfig(
        vision_config=VISION, vocab_size=words.get_vocab_size(), bos_token_id=start, eos_token_id=end, pad_token_id=pad, **SIZES,
    ))


def written_git(folder: Path, model) -> Path:
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return written(folder, model, {"image_processor_type": "CLIPImageProcessor"} | sizes)


def git(folder: Path) -> Path:
    return written_git(folder, scattered(new_git()))


def taught_git(folder: Path, steps: int = 150) -> Path:
    """One that says what `tiny.caption` says of each colour."""
    model, words = new_git(), tiny.tokenizer()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    shown = torch.stack([torch.from_numpy(picture[:SIDE, :SIDE]).permute(2, 0, 1) / 255 for picture in tiny.pictures(16, seed=1)])
    ids = [[words.token_to_id("[CLS]"), *words.encode(tiny.caption(i), add_special_tokens=False).ids, words.token_to_id("[SEP]")]
           for i in range(16)]
    batch = torch.tensor(ids)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch, pixel_values=(shown - mean) / std, labels=batch).loss.backward()
        optimizer.step()
    return written_git(folder, model.eval())


def coca(folder: Path) -> Path:
    from open_clip.coca_model import CoCa

    pieces = {"context_length": 76, "vocab_size": 49408, "layers": 2, "heads": 2, "width": 32}
    sizes = {
        "embed_dim": 32,
        "multimodal_cfg": pieces | {"mlp_ratio": 4, "dim_head": 16, "n_queries": 8, "attn_pooler_heads": 2},
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "attentional_pool": True,
                       "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": pieces | {"embed_cls": True, "output_tokens": True},
    }
    model = scattered(CoCa(**sizes))
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": sizes | {"custom_text": True}, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


MAKERS = {"blip": blip, "git": git, "coca": coca}
