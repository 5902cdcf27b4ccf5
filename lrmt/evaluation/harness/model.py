"""An lrmt model behind lm-evaluation-harness' interface `LM`; needs the extra `harness`."""

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria

import lrmt
from lrmt.evaluation.decoding import decode_answer, generating, greedy, pad_left, pad_token_id
from lrmt.evaluation.run import load_tokenizer, tell_of_full_weights
from lrmt.progress import progress
from lrmt.tasks.base import Pieces


class HarnessModel(TemplateLM):
    """Answers and scores as `lrmt evaluate` does: texts of any length, never truncated, tokenised as in training.

    Not the harness' own `HFLM`, which cuts prompts to the window of the backbone, pads without a mask when it scores, and
    computes logits for every position of a text.

    Args:
        pretrained: folder that training or merging wrote. batch_size: texts at once, those of a batch padded to the longest.
        device: "cpu" or a GPU such as "cuda:0" (default: the first GPU, or the CPU where there is none).
        load_in_4bit: backbone in NF4 (default: as trained). reading: settings of `lrmt.load`, for landmark attention.
        max_batch_size: of the harness' automatic batch size, which this model does not have.
    """

    def __init__(
        self, pretrained, *, batch_size=1, device=None, load_in_4bit=None, max_batch_size=None, **reading
    ) -> None:
        super().__init__()
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        self._device = torch.device("cpu" if on_cpu else device or "cuda:0")
        device_map = None if on_cpu else {"": self._device}
        model = lrmt.load(pretrained, load_in_4bit=load_in_4bit, device_map=device_map, **reading).eval()
        tell_of_full_weights(pretrained, load_in_4bit, reading.get("model_name_or_path"))
        self.model = model if hasattr(model, "disable_adapter") else model.to(self._device)
        self.generate = generating(self.model)
        self.tokenizer = load_tokenizer(pretrained, reading.get("model_name_or_path"))
        self.batch_size = int(batch_size)
        self.prefix = Pieces(self.tokenizer).prefix

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of a text, which begins with a space and without special tokens, as in training: those in it are text."""
        text = self.prefix + string if string[:1].strip() else string
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The continuation of each (text, generation arguments), up to the end-of-sequence token or a stop string."""
        queue = Collator(
            [request.args for request in requests],
            sort_fn=lambda request: -len(request[0]),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        outputs = []
        for batch in self._batches(queue, len(requests), "answer", disable_tqdm):
            texts, arguments = zip(*batch, strict=True)
            for text, output in zip(texts, self._generate(texts, arguments[0]), strict=True):
                self.cache_hook.add_partial("generate_until", (text, arguments[0]), output)
                outputs.append(output)
        return queue.get_original(outputs)

    def _batches(self, queue: Collator, total: int, unit: str, quiet: bool):
        """The queue's batches, with a bar of the requests done."""
        with progress(total, unit, disable=quiet) as bar:
            for batch in queue.get_batched(n=self.batch_size):
                yield batch
                bar.update(len(batch))

    def _generate(self, texts, arguments: dict) -> list[str]:
        arguments = normalize_gen_kwargs(arguments)
        stop, max_new_tokens = arguments.pop("until"), arguments.pop("max_gen_toks")
        if not arguments["do_sample"]:
            arguments.pop("temperature", None)
        input_ids, attention_mask = self._pad([self.tok_encode(text) for text in texts])
        ids = self.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stop, *reversed(input_ids.shape)),
            **greedy(self.tokenizer, max_new_tokens) | arguments,
        )
        answers = [decode_answer(row, self.tokenizer) for row in ids[:, input_ids.shape[1] :].tolist()]
        return [postprocess_generated_text(answer, stop, None) for answer in answers]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids) the log-likelihood of the continuation, and whether it is greedy."""
        queue = Collator(requests, sort_fn=lambda request: -len(request[1]) - len(request[2]))
        answers = []
        for batch in self._batches(queue, len(requests), "text", disable_tqdm):
            texts, contexts, continuations = zip(*batch, strict=True)
            for request, answer in zip(texts, self._score(contexts, continuations), strict=True):
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, answer)
                answers.append(answer)
        return queue.get_original(answers)

    def _score(self, contexts, continuations) -> list[tuple[float, bool]]:
        input_ids, attention_mask = self._pad([[*c, *d] for c, d in zip(contexts, continuations, strict=True)])
        lengths = [len(ids) for ids in continuations]
        labels = torch.full_like(input_ids, -100)
        for row, length in enumerate(lengths):
            labels[row, labels.shape[1] - length :] = input_ids[row, labels.shape[1] - length :]
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).logits
        targets = labels[labels != -100]  # row by row, as the logits are
        likelihoods = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].split(lengths)
        greedy = (logits.argmax(-1) == targets).split(lengths)
        return [(float(scores.sum()), bool(same.all())) for scores, same in zip(likelihoods, greedy, strict=True)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text after the end-of-sequence token; memory reads it in one go, not in windows."""
        texts = [request.args[0] for request in requests]
        scored = [(None, [self.prefix_token_id], self.tok_encode(text)) for text in texts]
        likelihoods = [answer for answer, _ in self._loglikelihood_tokens(scored, disable_tqdm)]
        for text, likelihood in zip(texts, likelihoods, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), likelihood)
        return likelihoods

    def _pad(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, attention_mask = pad_left(rows, pad_token_id(self.tokenizer))
        return input_ids.to(self._device), attention_mask.to(self._device)
