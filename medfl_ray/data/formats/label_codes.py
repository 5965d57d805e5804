"""SNOMED CT codes for the names of labels, from pydicom's copy of the DICOM context groups.

A name is looked up as it is, then by the words that data sets use for the same thing, then without its side. What no
group knows is coded as tissue in general; its name stays readable as the segment's label.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

# Context groups of segmented property types, by the category that DICOM gives them (PS3.16, CID 7150).
GROUPS = {"MorphologicallyAbnormalStructure": 7194, "AnatomicalStructure": 7192, "Tissue": 7191, "BodySubstance": 7197}
MODIFIERS = {"left": "Left", "right": "Right", "anterior": "Anterior", "posterior": "Posterior"}

# Names in public data sets -> (category, keyword in pydicom's SNOMED dictionary).
ABNORMAL, ANATOMY, TISSUE, SUBSTANCE = GROUPS
SYNONYMS: dict[str, tuple[str, str]] = {
    "tumor": (ABNORMAL, "Neoplasm"), "glioma": (ABNORMAL, "Neoplasm"), "cancer": (ABNORMAL, "Neoplasm"),
    "tumor core": (ABNORMAL, "Neoplasm"), "whole tumor": (ABNORMAL, "Neoplasm"), "core": (ABNORMAL, "Neoplasm"),
    "enhancing tumor": (ABNORMAL, "Neoplasm"), "non enhancing tumor": (ABNORMAL, "Neoplasm"),
    "metastasis": (ABNORMAL, "NeoplasmSecondary"), "carcinoma": (ABNORMAL, "Neoplasm"),
    "edema": (ABNORMAL, "Edema"), "oedema": (ABNORMAL, "Edema"), "peritumoral edema": (ABNORMAL, "Edema"),
    "necrosis": (ABNORMAL, "Necrosis"), "necrotic core": (ABNORMAL, "Necrosis"), "lesion": (ABNORMAL, "Lesion"),
    "hematoma": (ABNORMAL, "Hemorrhage"), "haemorrhage": (ABNORMAL, "Hemorrhage"), "bleeding": (ABNORMAL, "Hemorrhage"),
    "nodule": (ABNORMAL, "Nodule"), "cyst": (ABNORMAL, "Cyst"), "mass": (ABNORMAL, "Mass"),
    "hippocampus": (ANATOMY, "Hippocampus"), "liver": (ANATOMY, "Liver"), "kidney": (ANATOMY, "Kidney"),
    "spleen": (ANATOMY, "Spleen"), "pancreas": (ANATOMY, "Pancreas"), "lung": (ANATOMY, "Lung"),
    "heart": (ANATOMY, "Heart"), "prostate": (ANATOMY, "Prostate"), "stomach": (ANATOMY, "Stomach"),
    "gallbladder": (ANATOMY, "Gallbladder"), "gall bladder": (ANATOMY, "Gallbladder"), "colon": (ANATOMY, "Colon"),
    "esophagus": (ANATOMY, "Esophagus"), "oesophagus": (ANATOMY, "Esophagus"), "aorta": (ANATOMY, "Aorta"),
    "adrenal gland": (ANATOMY, "AdrenalGland"), "duodenum": (ANATOMY, "Duodenum"), "brain": (ANATOMY, "Brain"),
    "inferior vena cava": (ANATOMY, "InferiorVenaCava"), "ivc": (ANATOMY, "InferiorVenaCava"),
    "portal vein": (ANATOMY, "PortalVein"), "trachea": (ANATOMY, "Trachea"), "vertebra": (ANATOMY, "Vertebra"),
    "spine": (ANATOMY, "Spine"), "left atrium": (ANATOMY, "LeftAtrium"), "femur": (ANATOMY, "Femur"),
    "left ventricle": (ANATOMY, "LeftVentricle"), "right ventricle": (ANATOMY, "RightVentricle"),
    "rectum": (ANATOMY, "Rectum"), "uterus": (ANATOMY, "Uterus"), "breast": (ANATOMY, "Breast"),
    "thalamus": (ANATOMY, "Thalamus"), "cerebellum": (ANATOMY, "Cerebellum"), "skull": (ANATOMY, "Skull"),
    "white matter": (ANATOMY, "WhiteMatter"), "gray matter": (ANATOMY, "GrayMatter"),
    "grey matter": (ANATOMY, "GrayMatter"), "csf": (SUBSTANCE, "CerebrospinalFluid"),
    "vessel": (TISSUE, "BloodVessel"), "fat": (TISSUE, "AdiposeTissue"), "bone": (TISSUE, "BoneTissue"),
    "muscle": (TISSUE, "MuscleTissue"), "skin": (TISSUE, "Skin"),
}  # fmt: skip


@dataclass(frozen=True)
class LabelCode:
    """How DICOM says what a segment is: category, type, and side where the name states one."""

    category: Code
    kind: Code
    modifiers: tuple[Code, ...] = ()

    @property
    def is_generic(self) -> bool:
        """Whether no group knows the name."""
        return bool(self.kind == codes.SCT.Tissue)


def code_of(name: str) -> LabelCode:
    """Return the codes of a label's name, in any case, with underscores or hyphens, in British or American spelling."""
    words = re.sub(r"[\W_]+", " ", name.casefold()).replace("tumour", "tumor").strip()
    found = _lookup(words)
    if found is not None:
        return found
    parts = words.split()
    sides = tuple(word for word in parts if word in MODIFIERS)
    rest = [word for word in parts if word not in MODIFIERS]
    found = _lookup(" ".join(rest)) if rest else None
    if found is None:
        return LabelCode(codes.SCT.Tissue, codes.SCT.Tissue)
    return LabelCode(found.category, found.kind, tuple(getattr(codes.SCT, MODIFIERS[side]) for side in sides))


def _lookup(words: str) -> LabelCode | None:
    for candidate in (words, words.removesuffix("s")):
        if candidate in SYNONYMS:
            category, keyword = SYNONYMS[candidate]
            return LabelCode(getattr(codes.SCT, category), getattr(codes.SCT, keyword))
        if candidate in _by_meaning():
            return _by_meaning()[candidate]
    return None


@cache
def _by_meaning() -> dict[str, LabelCode]:
    """Every concept of the context groups by its words; the first group that has them wins."""
    table: dict[str, LabelCode] = {}
    for category, group in GROUPS.items():
        concepts = getattr(codes, f"cid{group}")
        for keyword in concepts.dir():
            code = getattr(concepts, keyword)
            if code.scheme_designator == "SCT":
                words = re.sub(r"\W+", " ", code.meaning.casefold()).strip()
                table.setdefault(words, LabelCode(getattr(codes.SCT, category), code))
    return table
