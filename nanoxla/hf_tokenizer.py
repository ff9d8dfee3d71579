"""The tokenizer files of a Hugging Face directory, made from a SentencePiece model.

The packages transformers and tokenizers are not needed to write them. transformers could write
tokenizer.json too. But version 5 reads a tokenizer of the class LlamaTokenizer differently: a text
with a leading space gets other ids.
"""
from nanoxla.hf_directory import json_bytes


def tokenizer_files(path, processor, context):
    """{name: bytes} of the files for the tokenizer at `path`.

    processor: a SentencePieceProcessor that has loaded it. context: the longest text that the model
    reads, in tokens. Raises ValueError, with the reason, if tokenizer.json cannot express it."""
    special = {"bos_token": processor.id_to_piece(processor.bos_id()),
               "eos_token": processor.id_to_piece(processor.eos_id()),
               "unk_token": processor.id_to_piece(processor.unk_id())}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json unchanged
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # generate() refuses token_type_ids
        "add_bos_token": True,
        "add_eos_token": False,
        # As in SentencePiece, "</s>" in a text is four characters, and does not end the document.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.model": path.read_bytes(),
            "tokenizer.json": json_bytes(tokenizer_json(processor)),
            "tokenizer_config.json": json_bytes(config),
            "special_tokens_map.json": json_bytes(special)}


def tokenizer_json(processor):
    """tokenizer.json, as a dict. With it, the `tokenizers` package encodes every text as the
    SentencePiece model does. Raises ValueError, with the reason, if that is not possible."""
    check_normalization(processor)
    ids = range(processor.vocab_size())
    if sum(map(processor.is_byte, ids)) != 256:
        raise ValueError("it has no tokens for single bytes")
    control = [{"id": i, "content": processor.id_to_piece(i), "single_word": False,
                "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for i in ids if processor.is_control(i) or processor.is_unknown(i)]
    bos = processor.id_to_piece(processor.bos_id())

    def bos_and(text, type_id):
        return [{"SpecialToken": {"id": bos, "type_id": type_id}},
                {"Sequence": {"id": text, "type_id": type_id}}]

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": control,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": bos_and("A", 0),
            "pair": bos_and("A", 0) + bos_and("B", 1),
            "special_tokens": {bos: {"id": bos, "ids": [processor.bos_id()], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": processor.id_to_piece(processor.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {processor.id_to_piece(i): i for i in ids},
            "merges": merges(processor)},
    }


def check_normalization(processor):
    """Raises ValueError if the SentencePiece model changes a text beyond what the normalizer above
    does: put "▁" before it, and replace each space by "▁"."""
    texts = ["a", "  a  b ", "\n\t", "e\N{COMBINING ACUTE ACCENT}",
             "\N{LATIN SMALL LIGATURE FI}", "\N{IDEOGRAPHIC SPACE}"]
    if any(processor.normalize(text) != "▁" + text.replace(" ", "▁") for text in texts):
        raise ValueError("it changes the text before it encodes it")


def merges(processor):
    """The pairs of pieces that `tokenizers` may join, [left, right], in order of priority.

    Both packages start with single characters, and join two neighbours until none fit. At each
    step, SentencePiece joins the two whose union is the piece with the highest score (the leftmost
    two, if several have it). `tokenizers` joins the two that stand first in this list. So the list
    holds, for each piece, all pairs that make it up, and pieces with a higher score come first. For
    example, "abc" adds [ab, c] and [a, bc], if all four parts are pieces.

    Equal scores occur: in Mistral's tokenizer, all runs of spaces have the same. Then the pair with
    the longest left part comes first."""
    normal = {}  # {piece: id} of the pieces that are neither a control token nor a byte
    for i in range(processor.vocab_size()):
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i)
                or processor.is_unused(i)):
            normal[processor.id_to_piece(i)] = i
    found = []
    for piece, i in normal.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in normal and right in normal]
        if len(piece) > 1 and not pairs:
            raise ValueError(f"its piece {piece!r} is not the union of two others, as in BPE")
        found += [(-processor.get_score(i), -len(left), -len(right), left, right)
                  for left, right in pairs]
    return [[left, right] for *_, left, right in sorted(found)]
