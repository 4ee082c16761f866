"""Models made on the spot: a Qwen2 with random weights and a byte tokenizer with a chat template."""

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]


def make_tiny_tokenizer():
    """One token a byte: a Qwen2 tokenizer without merges (what AutoTokenizer makes of a qwen2 folder)."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet())]
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIALS[4:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def make_tiny_model(
    directory: Path,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    vocab_size: int = 288,
    tied: bool = True,
    scale: float = 4.0,
) -> Path:
    """Save a random Qwen2 (float32). `scale` widens the logits so that distributions are far from uniform."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tiny_tokenizer()
    assert vocab_size >= len(tokenizer)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def make_capped_model(directory: Path) -> Path:
    """Save a random Gemma 2 (float32) whose attention scores are well beyond their cap, and whose logits have none."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=1,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=None,
    )
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(20)
    model.save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return Path(directory)
