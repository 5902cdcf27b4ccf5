"""Published accuracies on BABILong, the reference rows of `lrmt report`. Facts of their papers, named beside them."""

from lrmt.lengths import parse_tokens

#: the task of a mean over qa1 … qa5
MEAN = "qa1-5"

PAPERS = {
    "2406.10149": "Kuratov et al. 2024, BABILong, arXiv:2406.10149",
    "2407.04841": "Rodkin et al. 2024, Associative Recurrent Memory Transformer, arXiv:2407.04841",
    "2402.10790": "Kuratov et al. 2024, In Search of Needles in a 11M Haystack, arXiv:2402.10790",
}

LENGTHS = ("4k", "16k", "32k", "64k", "128k", "512k", "1M", "10M")

# model, paper, task, and accuracies in % at LENGTHS; None where none was published
ROWS = (
    ("RMT 137M", "2406.10149", "qa1", (100, 100, 99, 96, 94, 87, 84, 66)),
    ("RMT 137M", "2406.10149", "qa2", (98, 94, 82, 59, 39, 25, 22, 19)),
    ("RMT 137M", "2406.10149", "qa3", (81, 66, 55, 55, 36, 25, 22, 21)),
    ("RMT 137M", "2406.10149", "qa4", (83, 75, 64, 51, 38, 26, 24, 20)),
    ("RMT 137M", "2406.10149", "qa5", (99, 94, 90, 89, 86, 69, 63, 44)),
    ("ARMT 137M", "2407.04841", "qa1", (100, 100, 100, 100, 100, 99, 99, 89)),
    ("ARMT 137M", "2407.04841", "qa2", (100, 100, 100, 100, 100, 99, 99, 84)),
    ("ARMT 137M", "2407.04841", "qa3", (92, 92, 91, 90, 86, 80, 72, 37)),
    ("ARMT 137M", "2407.04841", "qa4", (100, 100, 100, 100, 100, 100, 100, 92)),
    ("RMT-R 137M", "2402.10790", "qa1", (100, 99.9, 99.9, 99.7, 99.5, 97.5, 97.4, 86.0)),
    ("GPT-4 + RAG by sentence", "2402.10790", "qa1", (61.5, None, None, None, 55, None, 51, 19.5)),
    ("GPT-4 + RAG by segment", "2402.10790", "qa1", (70, None, None, 24, None, None, None, 4)),
    ("GPT-4", "2406.10149", MEAN, (74, 64, 53, 43, 36, None, None, None)),
    ("Mistral-7B-v0.2", "2406.10149", MEAN, (49, 42, 37, None, None, None, None, None)),
    ("ChatQA + RAG", "2406.10149", MEAN, (46, 45, 44, 42, 45, 42, 39, 37)),
)


def published_records() -> list[dict]:
    """Records with `model`, `paper`, `task`, `length_tokens`, `accuracy` (0..1)."""
    return [
        {
            "model": model,
            "paper": paper,
            "task": task,
            "length_tokens": parse_tokens(length),
            "accuracy": accuracy / 100,
        }
        for model, paper, task, accuracies in ROWS
        for length, accuracy in zip(LENGTHS, accuracies, strict=True)
        if accuracy is not None
    ]
