"""What a TIFF says besides its pixels.

GDAL knows best how GDAL reads: it writes a GeoTIFF of one pixel into memory, and its tags are copied from there.
"""

import io
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from xml.etree import ElementTree

import tifffile
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from pipeline.raster.header import Header

SHORT, LONG, RATIONAL, DOUBLE, IFD, LONG8, IFD8, ASCII = 3, 4, 5, 12, 13, 16, 18, 2
"""Types of tags, as TIFF numbers them."""

SUB_IFDS = 330

IMAGE_DESCRIPTION, MAX_SAMPLE_VALUE, XMP, TIEPOINTS, GEO_KEYS, GDAL_METADATA, GDAL_NODATA = (
    270, 281, 700, 33922, 34735, 42112, 42113,
)  # fmt: skip

OF_EVERY_LEVEL = (258, 262, 277, 284, 338, 339, GDAL_NODATA)
"""Bits, photometric interpretation, samples, planes, extra samples, sample format: what overviews say, too."""

OF_ITS_PIXELS = frozenset({254, 256, 257, 259, 266, 273, 278, 279, 317, 322, 323, 324, 325})
"""Size, compression, and where the data of GDAL's one pixel are: not copied."""


@dataclass(frozen=True)
class Tag:
    """An entry of a TIFF's directory."""

    code: int
    type: int
    count: int
    value: bytes
    """Little-endian, as it stands in the file."""


def tag(code: int, type: int, *values: int | float) -> Tag:
    """A tag of numbers.

    >>> tag(322, SHORT, 512).value
    b'\\x00\\x02'
    """
    letter = {SHORT: "H", LONG: "I", RATIONAL: "II", DOUBLE: "d", IFD: "I", LONG8: "Q", IFD8: "Q"}[type]
    count = len(values) // len(letter)
    return Tag(code, type, count, struct.pack("<" + letter * count, *values))


def table(code: int, type: int, count: int) -> Tag:
    """A tag of numbers that are not known yet."""
    return Tag(code, type, count, bytes(count * {LONG: 4, IFD: 4, LONG8: 8, IFD8: 8}[type]))


def text_tag(code: int, text: str) -> Tag:
    """A tag of text, in UTF-8."""
    value = text.encode("utf-8") + b"\0"
    return Tag(code, ASCII, len(value), value)


def descriptive_tags(header: Header) -> list[Tag]:
    """Everything that a TIFF says of the raster apart from its size and where its pixels are."""
    tags = {tag.code: tag for tag in _tags_of(authored(header))}
    if header.nodata is not None:  # rasterio refuses what the type cannot hold, although it harms nobody
        tags[GDAL_NODATA] = text_tag(GDAL_NODATA, f"{header.nodata:.17g}")
    if header.gcps and header.transform is None:
        tags[TIEPOINTS] = _tiepoints(header, is_point=_pixel_is_point(tags.get(GEO_KEYS)))
    if header.microns_per_pixel is not None and 282 not in tags:
        tags |= {tag.code: tag for tag in _resolution(header.microns_per_pixel)}
    if MAX_SAMPLE_VALUE not in tags and header.dtype in ("uint8", "uint16"):
        tags |= {tag.code: tag for tag in _largest_sample(header)}
    for domain, items in header.domains.items():
        if domain.startswith("xml:"):
            for key in items:
                _without_rasterios_key(tags, domain, key)
    _say_colors(tags, header)
    return sorted(tags.values(), key=lambda tag: tag.code)


def colors(header: Header) -> list[str]:
    """Names of rasterio's ColorInterp of all bands, alpha included."""
    return [band.color for band in header.bands] + ["alpha"] * (header.validity == "alpha")


def authored(header: Header) -> bytes:
    """A GeoTIFF of one pixel with all that is known of the raster, as GDAL writes it."""
    options: dict[str, Any] = {"PHOTOMETRIC": "RGB" if _is_rgb(header) else "MINISBLACK", "ALPHA": "NO"}
    if "SOURCE_ICC_PROFILE" in header.domains.get("COLOR_PROFILE", {}):
        options["SOURCE_ICC_PROFILE"] = header.domains["COLOR_PROFILE"]["SOURCE_ICC_PROFILE"]
    if header.transform is not None:
        options["transform"] = Affine(*header.transform)
    if header.crs is not None:
        options["crs"] = CRS.from_wkt(header.crs)
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(
            driver="GTiff", width=1, height=1, count=header.count, dtype=header.dtype, INTERLEAVE="PIXEL",
            ENDIANNESS="LITTLE", **options,
        ) as file:  # fmt: skip
            file.colorinterp = [ColorInterp[color] for color in colors(header)]
            _describe(file, header)
        return bytes(memory.getbuffer())


def _describe(file: Any, header: Header) -> None:
    file.update_tags(**_allowed(header.tags))
    for domain, items in header.domains.items():
        if domain != "COLOR_PROFILE":
            file.update_tags(ns=domain, **_allowed(items))
    if header.rpcs is not None:
        file.update_tags(ns="RPC", **header.rpcs)
    if header.gcps and header.transform is None:
        points = [GroundControlPoint(p.row, p.col, p.x, p.y, p.z, p.id, p.info) for p in header.gcps]
        file.gcps = (points, CRS.from_wkt(header.gcp_crs) if header.gcp_crs is not None else CRS())
    for index, band in enumerate(header.bands, 1):
        if band.name is not None:
            file.set_band_description(index, band.name)
        if band.unit is not None:
            file.set_band_unit(index, band.unit)
        file.update_tags(index, **_allowed(band.tags))
    alpha = header.count - len(header.bands)
    file.scales = [band.scale for band in header.bands] + [1.0] * alpha
    file.offsets = [band.offset for band in header.bands] + [0.0] * alpha


def _allowed(items: dict[str, str]) -> dict[str, str]:
    """Without names that rasterio cannot write, since they are its own arguments."""
    return {name: value for name, value in items.items() if name not in ("self", "bidx", "ns")}


def _tags_of(geotiff: bytes) -> list[Tag]:
    with tifffile.TiffFile(io.BytesIO(geotiff)) as file:
        return [
            Tag(tag.code, int(tag.dtype), tag.count, geotiff[tag.valueoffset : tag.valueoffset + tag.valuebytecount])
            for tag in file.pages.first.tags
            if tag.code not in OF_ITS_PIXELS
        ]


def _tiepoints(header: Header, is_point: bool) -> Tag:
    """Ground control points. GDAL 3.10 adds half a pixel of pixel-is-point rasters both when it writes and when it
    reads; here they are written so that they are read as they were."""
    half = 0.5 if is_point else 0.0
    return tag(
        TIEPOINTS, DOUBLE, *(v for p in header.gcps for v in (p.col - half, p.row - half, 0.0, p.x, p.y, p.z))
    )  # fmt: skip


def _pixel_is_point(geo_keys: Tag | None) -> bool:
    """Whether GTRasterTypeGeoKey (1025) is RasterPixelIsPoint (2)."""
    if geo_keys is None:
        return False
    shorts = struct.unpack(f"<{geo_keys.count}H", geo_keys.value)
    return any(shorts[k] == 1025 and shorts[k + 3] == 2 for k in range(4, len(shorts), 4))


def _resolution(microns_per_pixel: tuple[float, float]) -> list[Tag]:
    """Pixels per centimetre."""
    per_cm = [Fraction(10_000 / microns).limit_denominator(10_000) for microns in microns_per_pixel]
    if not all(0 < value.numerator < 1 << 32 for value in per_cm):
        return []
    x, y = per_cm
    return [tag(282, RATIONAL, *x.as_integer_ratio()), tag(283, RATIONAL, *y.as_integer_ratio()), tag(296, SHORT, 3)]


def _largest_sample(header: Header) -> list[Tag]:
    """Of samples with fewer bits than their type. GDAL would pack them; few others would read that."""
    bits = header.bands[0].bits
    if bits is None or header.validity == "alpha" or any(band.bits != bits for band in header.bands):
        return []  # one for all is all that GDAL reads
    return [tag(MAX_SAMPLE_VALUE, SHORT, *[(1 << bits) - 1] * header.count)]


def _is_rgb(header: Header) -> bool:
    return colors(header)[:3] == ["red", "green", "blue"]


def _say_colors(tags: dict[int, Tag], header: Header) -> None:
    """GDAL 3.10 forgets the colour of a fourth band after red, green and blue, and of a second grey one."""
    wanted = colors(header)
    understood = ["red", "green", "blue"] if _is_rgb(header) else ["gray"]
    understood += ["undefined"] * (len(wanted) - len(understood))
    if header.validity == "alpha":
        understood[-1] = "alpha"
    metadata = tags[GDAL_METADATA].value if GDAL_METADATA in tags else b"<GDALMetadata>\n</GDALMetadata>\n\0"
    if wanted != understood and b'role="colorinterp"' not in metadata:
        names = [
            {"Y": "YCbCr_Y", "Cb": "YCbCr_Cb", "Cr": "YCbCr_Cr", "other_ir": "OtherIR"}.get(color, color)
            for color in wanted
        ]
        items = [
            f'  <Item name="COLORINTERP" sample="{k}" role="colorinterp">{name}</Item>\n'
            for k, name in enumerate(names)
        ]
        start, end, rest = metadata.rpartition(b"</GDALMetadata>")
        value = start + "".join(items).encode() + end + rest
        tags[GDAL_METADATA] = Tag(GDAL_METADATA, ASCII, len(value), value)


def _without_rasterios_key(tags: dict[int, Tag], domain: str, key: str) -> None:
    """A domain of XML is one text without a key; rasterio writes the key into the text."""
    for code, written, meant in (
        (GDAL_METADATA, f'domain="{domain}">{key}=', f'domain="{domain}">'),
        (XMP, f"{key}=" if domain == "xml:XMP" else "", ""),
    ):
        if code in tags and written:
            value = tags[code].value.replace(written.encode(), meant.encode(), 1)
            tags[code] = Tag(code, tags[code].type, len(value), value)


def lay_out(
    ghost: bytes, tables: Sequence[Sequence[Tag]], is_big: bool, chained: bool
) -> tuple[bytes, list[dict[int, int]]]:
    """The file up to its tiles, and for every directory where the values of its tags stand.

    Args:
        chained: directories follow each other; otherwise all are children of the first.
    """
    entry, inline, link = ("<HHQ", 8, "<Q") if is_big else ("<HHI", 4, "<I")
    head = bytearray(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if is_big else struct.pack("<2sHI", b"II", 42, 0))
    first_link = len(head) - inline
    head += ghost
    starts, links, positions = [], [first_link], []
    for table in tables:
        head += bytes(-len(head) % 8)
        starts.append(len(head))
        head += struct.pack("<Q" if is_big else "<H", len(table))
        values_at = len(head) + len(table) * (struct.calcsize(entry) + inline) + inline
        at, values = {}, bytearray()
        for tag in table:
            head += struct.pack(entry, tag.code, tag.type, tag.count)
            at[tag.code] = len(head)
            if len(tag.value) <= inline:
                head += tag.value.ljust(inline, b"\0")
            else:
                values += bytes(-(values_at + len(values)) % 8)
                at[tag.code] = values_at + len(values)
                head += struct.pack(link, at[tag.code])
                values += tag.value
        links.append(len(head))
        head += bytes(inline) + values
        positions.append(at)
    head += bytes(-len(head) % 16)
    if not chained:
        links[1:] = [positions[0][SUB_IFDS] + k * inline for k in range(len(tables) - 1)] if len(tables) > 1 else []
    for where, start in zip(links, starts, strict=False):
        struct.pack_into(link, head, where, start)
    return bytes(head), positions


def ome_xml(header: Header) -> str:
    """The description that makes a TIFF an OME-TIFF: one image, whose channels are samples of one plane.

    Pure ASCII, whatever the names.
    """
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    root = ElementTree.Element(
        "OME",
        {
            "xmlns": schema,
            "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
            "xsi:schemaLocation": f"{schema} {schema}/ome.xsd",
            "Creator": "gigasr",
        },
    )
    image = ElementTree.SubElement(root, "Image", ID="Image:0")
    if "TIFFTAG_IMAGEDESCRIPTION" in header.tags:
        ElementTree.SubElement(image, "Description").text = _xml_text(header.tags["TIFFTAG_IMAGEDESCRIPTION"])
    size = {} if header.microns_per_pixel is None else dict(zip("XY", header.microns_per_pixel, strict=True))
    pixels = ElementTree.SubElement(
        image,
        "Pixels",
        {
            "ID": "Pixels:0", "DimensionOrder": "XYCZT", "Type": header.dtype.replace("float32", "float"),
            "SizeX": str(header.width), "SizeY": str(header.height), "SizeC": str(header.count), "SizeZ": "1",
            "SizeT": "1", "BigEndian": "false", "Interleaved": "true",
            **{f"PhysicalSize{axis}": repr(float(microns)) for axis, microns in size.items()},
        },
    )  # fmt: skip
    names = channel_names(header)
    ElementTree.SubElement(
        pixels, "Channel", ID="Channel:0:0", SamplesPerPixel=str(header.count), Name=_xml_text(", ".join(names))
    )
    ElementTree.SubElement(pixels, "TiffData", IFD="0", PlaneCount="1")
    if header.tags:
        ElementTree.SubElement(image, "AnnotationRef", ID="Annotation:0")
        notes = ElementTree.SubElement(root, "StructuredAnnotations")
        note = ElementTree.SubElement(notes, "MapAnnotation", ID="Annotation:0", Namespace="gigasr/tags")
        value = ElementTree.SubElement(note, "Value")
        for key, text in header.tags.items():
            ElementTree.SubElement(value, "M", K=_xml_text(key)).text = _xml_text(text)
    return ElementTree.tostring(root, encoding="us-ascii", xml_declaration=True).decode("ascii")


def channel_names(header: Header) -> Sequence[str]:
    """Of all bands, alpha included; a band without a name goes by its colour, or its number."""
    names = [
        band.name or (band.color if band.color != "undefined" else f"band {k}")
        for k, band in enumerate(header.bands, 1)
    ]
    return [*names, "alpha"] if header.validity == "alpha" else names


def _xml_text(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
