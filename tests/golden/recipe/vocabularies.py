"""Tiny tokenizers, each with its family's real normaliser, pre-tokenizer, decoder and special tokens."""

from dataclasses import dataclass, field

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .corpus import TRAINING_TEXT

# The splitting rules are facts of the published tokenizers: another rule gives other ids.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class Vocabulary:
    """A tokenizer with what the two file formats say about it apart from the tokens."""

    tokenizer: Tokenizer
    tokenizer_class: str
    ggml_model: str
    ggml_pre: str | None
    bos: str | None
    eos: str
    pad: str
    unk: str | None
    add_bos: bool
    chat_template: str
    # GGUF score per id, only where ggml_model is "llama".
    scores: list[float] = field(default_factory=list)

    @property
    def size(self):
        return self.tokenizer.get_vocab_size()

    @property
    def special_texts(self):
        return [t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special]

    def id(self, token):
        return self.tokenizer.token_to_id(token)


def _special(text):
    return AddedToken(text, special=True, normalized=False)


def _user_defined(text):
    return AddedToken(text, special=False, normalized=False)


def _train_byte_level(tokenizer, tokens, leading=()):
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=[_special(t) for t in leading],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)


def smollm(tokens=512):
    """SmolLM2: digits alone, then GPT-2's rule; special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = smollm_pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    _train_byte_level(tokenizer, tokens, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Vocabulary(
        tokenizer, "GPT2Tokenizer", "gpt2", "smollm", "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
        False, CHATML_WITH_DEFAULT_SYSTEM,
    )


def smollm_pre_tokenizer():
    return pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])


def llama3(tokens=500):
    """Llama 3: its split rule, whole pieces before merges, special tokens last."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    _byte_level_after(tokenizer, LLAMA3_SPLIT)
    _train_byte_level(tokenizer, tokens)
    tokenizer.add_special_tokens([_special(t) for t in [
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    ]])
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))],
        ),
    ])
    return Vocabulary(
        tokenizer, "PreTrainedTokenizerFast", "gpt2", "llama-bpe", bos, "<|eot_id|>", "<|end_of_text|>", None, True, HEADERS,
    )


def qwen2(tokens=496):
    """Qwen2: composed Unicode, its split rule, special tokens last."""
    return _qwen(tokens, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [], CHATML_WITH_OPTIONAL_SYSTEM)


def qwen3(tokens=496):
    """Qwen3: Qwen2's rule; `<think>` is a token of its own but not a special one."""
    return _qwen(tokens, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>"], CHATML_THAT_FORGETS_THOUGHTS)


def _qwen(tokens, special, user_defined, template):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    _byte_level_after(tokenizer, QWEN2_SPLIT)
    _train_byte_level(tokenizer, tokens)
    tokenizer.add_special_tokens([_special(t) for t in special])
    tokenizer.add_tokens([_user_defined(t) for t in user_defined])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return Vocabulary(
        tokenizer, "Qwen2Tokenizer", "gpt2", "qwen2", None, "<|im_end|>", "<|endoftext|>", None, False, template,
    )


def _byte_level_after(tokenizer, split):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()


GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
# Runs of newlines and spaces are pieces of their own in Gemma, declared user-defined rather than learned.
GEMMA_NEWLINES = ["\n" * n for n in range(1, 5)]
# Powers of two only: with others, runs longer than the longest piece differ between merging and longest-first matching.
GEMMA_SPACES = ["\u2581" * n for n in (2, 4, 8, 16)]


def gemma3(tokens=640):
    """Gemma 3: SentencePiece-like merges over characters, with a byte for every character unknown.

    Learned on characters; then the vocabulary is laid out as Gemma's is (special, runs, bytes, pieces, characters), with
    every way of splitting a piece in two as a merge, as converters from SentencePiece do.
    """
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n+"), behavior="removed"),
        pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
        pre_tokenizers.Split("\u2581", behavior="merged_with_next"),
    ])
    common = sorted({c for c in TRAINING_TEXT.replace(" ", "\u2581") if c != "\n" and ord(c) < 0x250 or c == "\u2581"})
    fixed = GEMMA_SPECIAL + GEMMA_NEWLINES + GEMMA_SPACES + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=tokens - len(fixed), limit_alphabet=len(common), initial_alphabet=common, show_progress=False,
    )
    learner.train_from_iterator(
        ["".join(c for c in line if c in common or c == " ") for line in TRAINING_TEXT.split("\n")], trainer
    )
    learned = learner.get_vocab()
    pieces = [p for p in sorted(learned, key=learned.get) if len(p) > 1 and p not in fixed]
    characters = [p for p in sorted(learned, key=learned.get) if len(p) == 1]
    laid_out = fixed + pieces + characters
    vocab = {piece: index for index, piece in enumerate(laid_out)}
    assert len(vocab) == len(laid_out)

    merges = []
    for piece in GEMMA_NEWLINES[1:] + GEMMA_SPACES + pieces:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted((h for h in halves if h[0] in vocab and h[1] in vocab), key=lambda h: (vocab[h[0]], vocab[h[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([_special(t) for t in GEMMA_SPECIAL])
    tokenizer.add_tokens([_user_defined(t) for t in GEMMA_NEWLINES + GEMMA_SPACES])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", vocab["<bos>"])],
    )

    # Merging by best score must choose what merging by rank chooses: a piece's score is minus its place among the learned.
    first_learned = len(fixed)
    scores = [0.0] * first_learned + [-float(rank) for rank in range(len(laid_out) - first_learned)]
    # Converters give tokens that were declared rather than learned a score out of reach.
    for token in GEMMA_SPECIAL + GEMMA_NEWLINES + GEMMA_SPACES:
        scores[vocab[token]] = -1000.0
    return Vocabulary(
        tokenizer, "GemmaTokenizer", "llama", "default", "<bos>", "<end_of_turn>", "<pad>", "<unk>", True,
        TURNS, scores,
    )


CHATML_WITH_DEFAULT_SYSTEM = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nYou are a tiny model made for tests.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_WITH_OPTIONAL_SYSTEM = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' ~ messages[0].content | trim ~ '<|im_end|>\\n' }}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if turn.role not in ['user', 'assistant'] %}
        {{- raise_exception('a turn is by the user or the assistant, not ' ~ turn.role) }}
    {%- endif %}
    {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CHATML_THAT_FORGETS_THOUGHTS = """{%- set last = namespace(user=0) %}
{%- for message in messages[::-1] %}
    {%- set place = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and message.content is string and place > last.user %}
        {%- set last.user = place %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set said = message.content %}
    {%- if message.role == 'assistant' and loop.index0 < last.user and '</think>' in said %}
        {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

TURNS = """{{ bos_token }}
{%- set ns = namespace(preamble='') -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set ns.preamble = messages[0]['content'] | trim + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (loop.index0 % 2 == 0) != (turn['role'] == 'user') -%}
        {{ raise_exception('user and assistant must take turns') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' }}
    {%- if loop.first %}{{ ns.preamble }}{% endif -%}
    {{ turn['content'] | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
"""
