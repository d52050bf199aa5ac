"""Real image files of every kind: what is read, how, and what is rejected."""
import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from timm_geoprior.data.reading import MAX_ASPECT_RATIO, MAX_PIXELS, read_image
from timm_geoprior.errors import ImageError

SIZE = (8, 6)  # width, height


@pytest.fixture(scope='module')
def picture():
    """A smooth coloured picture, 8 x 6 pixels."""
    rows, columns = np.mgrid[0:SIZE[1], 0:SIZE[0]]
    pixels = np.stack([columns * 32, rows * 40, 255 - columns * 16], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def pixels(image):
    return np.asarray(image, dtype=np.int64)


@pytest.mark.parametrize(('mode', 'ending'), [
    ('RGB', 'png'), ('RGB', 'bmp'), ('RGB', 'tiff'), ('CMYK', 'tiff'), ('RGBA', 'png'), ('RGBA', 'webp'), ('L', 'png'),
    ('LA', 'png'), ('1', 'png'), ('P', 'png'), ('P', 'gif'), ('PA', 'tiff'),
])
def test_every_mode_becomes_rgb(tmp_path, picture, mode, ending):
    path = tmp_path / f'picture.{ending}'
    kept = picture.convert('P').convert(mode) if mode == 'PA' else picture.convert(mode)
    kept.save(path, **({'lossless': True} if ending == 'webp' else {}))
    got = read_image(path)
    assert got.mode == 'RGB'
    assert got.size == SIZE
    expected = picture.convert('P').convert('RGB') if mode == 'PA' else kept.convert('RGB')
    assert np.abs(pixels(got) - pixels(expected)).max() <= 1


def test_jpegs_of_three_colour_spaces(tmp_path, picture):
    for mode in ('RGB', 'CMYK', 'L'):
        path = tmp_path / f'{mode}.jpg'
        picture.resize((64, 48)).convert(mode).save(path, quality=95)
        expected = picture.resize((64, 48)).convert(mode).convert('RGB')
        assert np.abs(pixels(read_image(path)) - pixels(expected)).mean() < 4, mode


@pytest.mark.parametrize(('values', 'dtype', 'ending'), [
    ((0, 257, 32896, 65535), '<u2', 'png'),
    ((0, 257, 32896, 65535), '<u2', 'tiff'),
    ((0, 257, 32896, 65535), '>u2', 'tiff'),
    ((-5, 257, 32896, 65535), '<i4', 'tiff'),
    ((0, 2 ** 23, 2 ** 30, 2 ** 31 - 128), '<i4', 'tiff'),
    ((0.0, 1 / 255, 128 / 255, 1.0), '<f4', 'tiff'),
    ((0.0, 1.0, 128.0, 255.0), '<f4', 'tiff'),
    ((float('nan'), 257.0, 32896.0, 65535.0), '<f4', 'tiff'),
    ((-0.01, 1.0, 128.0, 262.0), '<f4', 'tiff'),  # as after a resize that overshoots
    ((0, 1, 128, 255), '<i4', 'tiff'),
    ((0, 1, 128, 255), '<u2', 'png'),
    ((-1.0, -253 / 255, 1 / 255, 1.0), '<f4', 'tiff'),
    ((-2.0, 4 / 255 - 2, 512 / 255 - 2, 2.0), '<f4', 'tiff'),
])
def test_deep_grey_is_scaled_not_clipped(tmp_path, values, dtype, ending):
    path = tmp_path / f'deep.{ending}'
    Image.fromarray(np.array([values], dtype=dtype)).save(path)
    assert read_image(path).getchannel(0).tobytes() == bytes([0, 1, 128, 255])


@pytest.mark.parametrize(('mode', 'transparent'), [('RGBA', (9, 9, 9, 0)), ('LA', (9, 0))])
def test_transparency_lies_on_white(tmp_path, mode, transparent):
    image = Image.new(mode, SIZE, transparent)
    image.save(tmp_path / 'alpha.png')
    assert read_image(tmp_path / 'alpha.png').getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(('mode', 'colour', 'key'), [
    ('P', 'red', 0), ('RGB', (1, 2, 3), (1, 2, 3)), ('L', 7, 7), ('1', 0, 0)])
def test_a_transparent_colour_lies_on_white(tmp_path, mode, colour, key):
    Image.new(mode, SIZE, colour).save(tmp_path / 'key.png', transparency=key)
    assert read_image(tmp_path / 'key.png').getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize('ending', ['gif', 'png', 'webp', 'tiff'])
def test_the_first_frame_of_an_animation(tmp_path, ending):
    frames = [Image.new('RGB', SIZE, colour) for colour in ('red', 'blue', 'green')]
    frames[0].save(tmp_path / f'moving.{ending}', save_all=True, append_images=frames[1:])
    red, green, blue = np.asarray(read_image(tmp_path / f'moving.{ending}')).mean(axis=(0, 1))
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize('mode', ['RGB', 'P', 'I;16'])
def test_exif_rotation_is_carried_out(tmp_path, picture, mode):
    grey = np.asarray(picture.convert('L')).astype(np.uint16) * 257
    image = Image.fromarray(grey) if mode == 'I;16' else picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # as from a phone held upright: rotate clockwise to view
    image.save(tmp_path / 'turned.png', exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    if mode == 'I;16':
        upright = picture.convert('L').transpose(Image.Transpose.ROTATE_270)
    assert (pixels(read_image(tmp_path / 'turned.png')) == pixels(upright.convert('RGB'))).all()


def test_broken_exif_is_no_reason_to_refuse(tmp_path, picture):
    picture.save(tmp_path / 'odd.jpg', exif=b'Exif\0\0II*\0\x08\0\0\0\xff\xff' + bytes(range(60)))
    assert read_image(tmp_path / 'odd.jpg').size == SIZE


def test_one_pixel(tmp_path):
    Image.new('RGB', (1, 1), 'red').save(tmp_path / 'dot.png')
    assert read_image(tmp_path / 'dot.png').getpixel((0, 0)) == (255, 0, 0)


def png_header(width, height):
    """A PNG that states a size but has almost no data, like a decompression bomb."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


def encoded(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


NOISE = Image.frombytes('RGB', (64, 64), np.random.default_rng(0).bytes(64 * 64 * 3))
REFUSED = {
    'empty': (b'', 'not an image'),
    'text': (b'no picture at all\n' * 100, 'not an image'),
    'truncated PNG': (encoded(NOISE, 'PNG')[:4000], 'truncated'),
    'truncated JPEG': (encoded(NOISE, 'JPEG')[:1500], 'truncated'),
    'truncated GIF': (encoded(NOISE, 'GIF')[:2500], 'truncated'),
    'damaged PNG': (encoded(NOISE, 'PNG')[:3000] + bytes(9000), 'damaged'),
    'bomb': (png_header(100_000, 100_000), f'{MAX_PIXELS:,}'),
    'needle': (png_header(MAX_ASPECT_RATIO + 1, 1), f'{MAX_ASPECT_RATIO} times'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_refused_gets_one_sentence(tmp_path, case):
    content, words = REFUSED[case]
    path = tmp_path / 'picture.bin'
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f'{path} ')
    assert words in message
    assert re.search(r'\. (Convert it|Crop it|Replace the file|Scale it down)\.$', message)
    assert '\n' not in message


def test_our_own_limit_holds_where_pillows_is_lifted(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    (tmp_path / 'bomb.png').write_bytes(png_header(100_000, 100_000))
    with pytest.raises(ImageError, match=r'at most 178,956,970 pixels, got 100000 x 100000 = 10,000,000,000\. Scale'):
        read_image(tmp_path / 'bomb.png')


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ImageError, match='does not exist'):
        read_image(tmp_path / 'nothing.png')
    with pytest.raises(ImageError, match='is a folder'):
        read_image(tmp_path)
