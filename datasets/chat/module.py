"""The DataModule of conversations with images and videos: the embedded set, or chat files with any processor of
transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoProcessor

from mmskip.datasets.chat.batches import ChatCollate, ChatLoader, Loaded, PromptCollate
from mmskip.datasets.chat.format import Chat, read_records
from mmskip.datasets.chat.index import ChatIndex, cache_key, cut_long, measure_all, pack_rows, parse_all
from mmskip.datasets.chat.labels import ChatLabels
from mmskip.datasets.common.module import BaseData
from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.synthetic.chat import CLIP_FPS, SceneChatConfig, generate_chat, scene_processor
from mmskip.utils.pretrained import pretrained

_EMBEDDED = SceneChatConfig()
_FILE_FPS = 1.0


class ChatDataset(Dataset[list[Loaded]]):
    """Rows of conversations, read on access (without packing, one each)."""

    def __init__(self, chats: Sequence[Chat | None], rows: Sequence[Sequence[int]], loader: ChatLoader) -> None:
        self.chats, self.rows, self.loader = chats, rows, loader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Loaded]:
        return [self.loader(chat) for number in self.rows[index] if (chat := self.chats[number]) is not None]


class ChatData(BaseData):
    """Conversations with images and videos: batches of `mmskip.datasets.chat.batches.ChatCollate`.

    Without `files` it is the embedded set, written under `root` on first use. Your own files are read once before the
    first training: conversations with a missing or broken file, and those longer than `max_tokens`, are left out,
    counted and reported; the result is kept under `root`.

    Args:
        root: folder for everything that is made here.
        generated: settings of the embedded set.
        files: chat file (.json or .jsonl) per split ("train", "val", "test"); splits may be missing. Both Hugging Face
            `messages` (with paths in the parts, or in `images` and `videos`) and LLaVA's `conversations` are read.
        media_dir: folder that relative paths of media start from; None: the folder of each file.
        processor: name or folder of a processor of transformers; None: one made for the embedded set.
        processor_kwargs: further arguments of the processor's calls, e.g. `{max_pixels: 200704}`.
        chat_template: Jinja text, or a file with it, in place of the processor's own.
        fps: frames per second at which videos are sampled; None: 1, and 4 for the embedded clips.
        max_frames: most frames of a video, >= 1; longer videos are sampled more sparsely.
        batch_size, eval_batch_size: rows per batch and rank, in training and else (None: the same).
        num_workers: loader processes.
        max_tokens: longest conversation, tokens; with `pack`, the length of a row. None: no limit.
        pack: put several training conversations into one row (needs max_tokens).
        padding_side: "right" or "left".
        blank: show black pictures (control).
        seed: of the order of training rows.

    Raises:
        ValueError: contradicting or impossible arguments, or missing files; before work starts.
    """

    def __init__(
        self,
        root: str = "data",
        generated: SceneChatConfig = _EMBEDDED,
        files: dict[str, str] | None = None,
        media_dir: str | None = None,
        processor: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
        fps: float | None = None,
        max_frames: int = 16,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        max_tokens: int | None = None,
        pack: bool = False,
        padding_side: str = "right",
        blank: bool = False,
        seed: int = 0,
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        if batch_size < 1 or max_frames < 1 or (fps is not None and not fps > 0):
            raise ValueError(
                f"batch_size and max_frames must be >= 1 and fps > 0, got batch_size={batch_size}, "
                f"max_frames={max_frames}, fps={fps}"
            )
        if pack and max_tokens is None:
            raise ValueError("pack=true needs max_tokens, the length of a row")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {max_tokens}")
        if files is not None and processor is None:
            raise ValueError("files need a processor: the name or folder of the model they are for")
        _check_files(files, media_dir)
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.generated, self.files, self.media_dir = generated, files, media_dir
        self.processor_name, self.processor_kwargs = processor, processor_kwargs or {}
        self.chat_template = _template(chat_template)
        self.fps = fps or (CLIP_FPS if files is None else _FILE_FPS)
        self.max_frames, self.max_tokens, self.pack = max_frames, max_tokens, pack
        self.padding_side, self.blank = padding_side, blank
        self.root = Path(root)
        self.folder = self.root / (f"chat-{generated.id}" if files is None else "chat")
        self.indices: dict[str, ChatIndex] = {}
        self._chats: dict[str, list[Chat | None]] = {}
        self._labels: ChatLabels | None = None

    # --- processor ----------------------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """The processor of transformers."""
        return self.labels.processor

    @property
    def labels(self) -> ChatLabels:
        """The processor's labels.

        Raises:
            ValueError: there is no such processor, or it has no chat template.
        """
        if self._labels is None:
            name = self.processor_name
            load = AutoProcessor.from_pretrained
            processor = scene_processor(self.generated) if name is None else pretrained("processor", name, load)
            if self.chat_template is not None:
                processor.chat_template = self.chat_template
            self._labels = ChatLabels(processor)
        return self._labels

    # --- data ---------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Write the embedded set, or read the files once, as far as not done yet. Lightning calls it on one rank."""
        labels = self.labels
        if self.files is None:
            generate_chat(self.folder, self.generated)
        for split in self._splits():
            index = self._index(split)
            report = index.report()
            usable = f"{split}: {len(index.usable)} of {len(index.lengths)} conversations are used"
            if report:
                rank_zero_warn(f"{usable}; left out: {report}")
            else:
                rank_zero_info(usable)
            if not index.usable:
                raise ValueError(f"{split} has no usable conversation: {report}")
        assert labels is self.labels

    def dataset(self, split: str, prompt: bool = False) -> ChatDataset:
        """The rows of a split, after `prepare_data`.

        Raises:
            ValueError: the split has no file.
        """
        if split not in self._splits():
            raise ValueError(f"no file for split {split!r}; given: {', '.join(self._splits())}")
        index = self._index(split)
        rows = [[number] for number in index.usable]
        if self.pack and split == "train":
            assert self.max_tokens is not None
            rows = pack_rows(index, self.max_tokens, self.seed)
        loader = ChatLoader(self.labels, self.fps, self.max_frames, self.blank, prompt)
        return ChatDataset(self._chats[split], rows, loader)

    def collate(self, pack: bool = False) -> ChatCollate:
        """Make the function that collates rows to batches."""
        return ChatCollate(self.labels, self.processor_kwargs, self.padding_side, pack)

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return self.files is None or split in self.files

    def collate_of(self, split: str) -> ChatCollate:
        """Collate function of a split; training rows may be packed."""
        return self.collate(self.pack and split == "train")

    def predict_dataloader(self) -> DataLoader:
        """The test conversations (of val, where there is no test) without their last answers."""
        dataset = self.dataset(self.predicted_split(), prompt=True)
        return self.in_order(dataset, PromptCollate(self.labels, self.processor_kwargs))

    # --- parts --------------------------------------------------------------------------------------------------

    def _splits(self) -> list[str]:
        return [split for split in SPLITS if self.has(split)]

    def _index(self, split: str) -> ChatIndex:
        if split not in self.indices:
            source = self.folder / f"{split}.jsonl" if self.files is None else Path(self.files[split])
            folder = source.parent if self.media_dir is None else Path(self.media_dir)
            chats, index = parse_all(read_records(source), folder, source.name)
            # the embedded set is complete; its lengths matter only where they are limited
            if self.files is not None or self.max_tokens is not None:
                measure_all(chats, index, self._measure, self._cache(split, source, folder), self.num_workers)
            if self.max_tokens is not None:
                cut_long(index, self.max_tokens)
            self._chats[split], self.indices[split] = chats, index
        return self.indices[split]

    def _measure(self, chat: Chat) -> int:
        loader = ChatLoader(self.labels, self.fps, self.max_frames, self.blank)
        return int(self.collate()([[loader(chat)]])["input_ids"].shape[1])

    def _cache(self, split: str, source: Path, folder: Path) -> Path:
        """File of the lengths of a split; its name depends on the settings and the source."""
        stamp = source.stat()
        key = cache_key(
            str(source.resolve()),
            stamp.st_size,
            stamp.st_mtime_ns,
            str(folder.resolve()),
            self.processor_name,
            self.processor_kwargs,
            self.labels.template,
            self.fps,
            self.max_frames,
        )
        return self.folder / "lengths" / f"{split}-{key}.json"


def _template(given: str | None) -> str | None:
    return Path(given).read_text() if given is not None and "{" not in given and Path(given).is_file() else given


def _check_files(files: dict[str, str] | None, media_dir: str | None) -> None:
    if files is None:
        if media_dir is not None:
            raise ValueError(f"media_dir={media_dir!r} needs files as well")
        return
    if unknown := set(files) - set(SPLITS):
        raise ValueError(f"files has the unknown splits {', '.join(sorted(unknown))}; known: {', '.join(SPLITS)}")
    if "train" not in files and "val" not in files and "test" not in files:
        raise ValueError(f"files is empty; expected a chat file for some of {', '.join(SPLITS)}")
    for split, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"files[{split!r}]: there is no file {path}")
    if media_dir is not None and not Path(media_dir).is_dir():
        raise ValueError(f"media_dir: there is no folder {media_dir}")
