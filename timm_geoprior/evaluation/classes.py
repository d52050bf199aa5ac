"""Matching the classes of the data with those of the model, by name."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ClassMismatchError


@dataclass(frozen=True)
class ClassMatch:
    """How labels map to the model's class indices."""
    # the model's index of each class of the data, -1 if it is left out; empty if labels already are such indices
    to_model: NDArray[np.int64]
    competing: tuple[int, ...] | None = None  # the model's classes whose scores compete, sorted; None for all of them
    notes: tuple[str, ...] = ()  # messages for the user, one sentence each

    def apply(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """The model's class index of each label, -1 where the class is left out."""
        # an image without a class has -1, which must not index the last class
        return np.where(labels < 0, -1, self.to_model[labels]) if len(self.to_model) else labels


def match_classes(
        data_classes: Sequence[str],
        wnids: Sequence[str],
        names: Sequence[str],
        num_classes: int,
        subset: bool = False,
        sorted_names: bool = False,
) -> ClassMatch:
    """Match the data's classes with the model's, by WordNet id or else by readable name.

    If there are no names to compare, the labels are assumed to be the model's indices, and a note says so. The same
    holds if no name matches and the data's classes are only numbers, or in an order that was given explicitly.

    Args:
        data_classes: Names of the data's classes, in the order of the labels; may be empty.
        wnids: WordNet ids (or folder names) of the model's classes; may be empty.
        names: Readable names of the model's classes; may be empty.
        num_classes: Number of the model's scores.
        subset: Measure only the classes that both have, and let only their scores compete.
        sorted_names: Whether the order of the data's classes is only that of their folders' names.

    Raises:
        ClassMismatchError: There are classes that the model does not have, or none in common; or the order of the
            folders' names would have to be the model's, but the model has other names, or the order is ambiguous.
    """
    # 'crane' names two of ImageNet's classes, the bird and the machine: repeated names are ambiguous
    unique = [known for known in (wnids, names) if len(set(known)) == len(known)]
    known = next((known for known in unique if set(known) & set(data_classes)), None)
    if known is None:
        match = _by_position(data_classes, wnids, names, num_classes, subset)
        if sorted_names and match.notes:
            if wnids and not all(name.isdecimal() for name in data_classes):
                _refuse_other_names(data_classes, wnids)
            if sorted(data_classes) != list(data_classes):
                _refuse_two_orders(data_classes)
        return match
    index = {name: i for i, name in enumerate(known)}
    to_model = np.array([index.get(name, -1) for name in data_classes], dtype=np.int64)
    unknown = [name for name in data_classes if name not in index]
    present = sorted(int(i) for i in to_model if i >= 0)
    if unknown and not subset:
        raise ClassMismatchError(f'The model does not have {len(unknown)} of the {len(data_classes)} classes '
                                 f'({_some(unknown)}). Use --subset to measure the {len(present)} that both have.')
    if subset:
        note = (f'{len(present)} classes are in both, of {len(data_classes)} in the data and {num_classes} in the '
                f'model: only they are measured, and only their scores compete.')
        return ClassMatch(to_model, tuple(present), (note,))
    return ClassMatch(to_model, None, tuple(_notes(to_model, num_classes)))


def _notes(to_model: NDArray[np.int64], num_classes: int) -> list[str]:
    notes = []
    if len(to_model) < num_classes:
        notes.append(f"{len(to_model)} of the model's {num_classes} classes have images here, and all {num_classes} "
                     f'scores compete: with --subset only those {len(to_model)} do.')
    if (np.diff(to_model) < 0).any():
        notes.append("The classes are not in the model's order here: they are matched by name.")
    return notes


def _by_position(
        data_classes: Sequence[str],
        wnids: Sequence[str],
        names: Sequence[str],
        num_classes: int,
        subset: bool,
) -> ClassMatch:
    """Use labels as the model's indices, if there are no names to compare, or none that match."""
    if subset:
        raise ClassMismatchError('--subset matches classes by name, and data and model have no name in common. Leave '
                                 'it out, or rename the class folders.')
    if data_classes and list(data_classes) == list(names):
        return ClassMatch(np.empty(0, np.int64))
    count = len(data_classes)
    if count and count != num_classes:
        known = f', which begin with {wnids[0]}' if wnids else ''
        raise ClassMismatchError(f"The data must have the model's {num_classes} classes{known}, got {count} "
                                 f'({_some(data_classes)}). Check --data-dir and --split, or take another model.')
    note = "are not the model's names" if count and wnids else "cannot be compared with the model's"
    return ClassMatch(np.empty(0, np.int64), None, (
        f"The class names of these data {note}: their order is assumed to be the model's.",))


def _refuse_other_names(classes: Sequence[str], wnids: Sequence[str]) -> None:
    raise ClassMismatchError(
        f"The class folders must have the model's names ({_some(wnids)}), got none of them ({_some(classes)}). Rename "
        f"the folders, or write their names in the order of the model's classes into a text file, one per line, and "
        f'name it with --class-map.')


def _refuse_two_orders(classes: Sequence[str]) -> None:
    """timm sorts class folders by the numbers in their names, torchvision's ImageFolder by character."""
    by_character = sorted(classes)
    first = next(place for place, name in enumerate(classes) if name != by_character[place])
    raise ClassMismatchError(
        f"The model's classes have no names here, and the {len(classes)} class folders can be sorted in two ways: "
        f'class {first} is {classes[first]} in natural order (timm), {by_character[first]} by character (ImageFolder). '
        f'Write the names in the order of training into a text file, one per line, and name it with --class-map.')


def _some(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more."""
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
