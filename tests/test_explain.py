"""Explanations show what the network does: windows to scale, receptive fields, one legible figure."""
import itertools
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform, resolve_model_data_config

from timm_geoprior.cli import main
from timm_geoprior.errors import GeoPriorError
from timm_geoprior.inference.classifier import Classifier, load_classifier
from timm_geoprior.layers import mix_values
from timm_geoprior.radii import learned_radii

pytest.importorskip('matplotlib')
pytest.importorskip('pytorch_grad_cam')
data = pytest.importorskip('skimage.data')

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import same_color  # noqa: E402
from matplotlib.patches import Ellipse, Polygon  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from timm_geoprior.inference.explain import (  # noqa: E402
    _plain_twin,
    draw_explanation,
    effective_field,
    receptive_pair,
    save_explanation,
)
from timm_geoprior.inference.windows import View, draw_windows, learned_windows, to_input, view_of  # noqa: E402

NANO = 'geoprior_resnet14_nano.r64_tin200'
MODELS = {
    'trained': (NANO, {'pretrained': True}),
    'resnet50': ('geoprior_resnet50', {'layers': (1, 1, 1, 1)}),  # all widths of the large networks
    'heads': ('geoprior_resnet14_nano', {
        'attn_heads': 2, 'attn_radius': 1.7, 'attn_kernel': 'laplacian', 'value_dims': (8, 8, 0, 24)}),
    'output_stride': ('geoprior_resnet14_nano', {'output_stride': 8, 'attn_radius': 0.6}),
}


@pytest.fixture(scope='module')
def nano():
    return load_classifier(NANO)


@pytest.fixture(scope='module')
def coffee():
    """600 x 400 pixels, the cup in the middle."""
    return Image.fromarray(data.coffee())


@pytest.fixture(scope='module', params=MODELS)
def model(request):
    name, options = MODELS[request.param]
    return timm.create_model(name, **options).eval()


def classifier_of(model, **config):
    """A classifier for any network, with names for all of its classes."""
    model.pretrained_cfg = {**model.pretrained_cfg, **config}
    transform = create_transform(**resolve_model_data_config(model))
    classes = tuple((f'n{i}', f'{i} WWW is a name that no panel is wide enough for') for i in range(model.num_classes))
    return Classifier('local-dir:/some/folder-whose-name-no-panel-is-wide-enough-for', model, transform, classes)


@pytest.mark.parametrize('size', [(451, 300), (200, 640), (64, 64), (90, 60)])
@pytest.mark.parametrize('config', [
    {'crop_pct': 0.875}, {'crop_pct': 1.0, 'crop_mode': 'squash'}, {'crop_pct': 0.9, 'crop_mode': 'border'},
    {'crop_pct': 0.95, 'input_size': (3, 64, 96)}])
def test_a_point_is_where_the_preprocessing_puts_it(size, config):
    classify = classifier_of(timm.create_model('geoprior_resnet14_nano'), **config)
    image = Image.new('RGB', size)
    point = 0.45 * size[0], 0.54 * size[1]
    spot = 0.06 * min(size)
    ImageDraw.Draw(image).ellipse([point[0] - spot, point[1] - spot, point[0] + spot, point[1] + spot], fill='white')
    view = view_of(classify, image.size)
    seen = classify.transform(image).mean(0)
    assert seen.shape == (view.height, view.width)
    bright = (seen - seen[seen.shape[0] // 2, seen.shape[1] // 3]).clamp(min=0)  # against black, not the border
    bright = torch.where(bright > bright.max() / 2, bright, 0)
    rows, columns = bright.sum(1), bright.sum(0)
    found = [float((weights * (torch.arange(len(weights)) + 0.5)).sum() / weights.sum()) for weights in (columns, rows)]
    assert found == pytest.approx(to_input(view, image.size, point), abs=1.0)
    assert to_input(view, image.size, None) == pytest.approx((view.width / 2, view.height / 2))


@pytest.mark.parametrize('point', [(33, 29), (20.5, 51), (0, 63.9)])
def test_a_window_is_what_the_layer_computes(model, point):
    """Compare the weights with the gradient of the layer's own output, at the query nearest to the point."""
    windows = iter(learned_windows(model, View((0, 0, 64, 64), 64, 64), point))
    for found in learned_radii(model, (3, 64, 64)):
        layer = model.get_submodule(found.name)
        for head in range(len(found.cells)):
            window = next(windows)
            values = torch.zeros(1, len(found.cells), found.height, found.width, requires_grad=True)
            mixed = mix_values(values, layer.log_radius, layer.stride, layer.dilation, layer.kernel)[0, head]
            row, column = min(
                itertools.product(*map(range, mixed.shape)), key=lambda query: math.dist(
                    [(layer.stride * index + 0.5) * 64 / found.height for index in query], point[::-1]))
            mixed[row, column].backward()
            torch.testing.assert_close(window.weights, values.grad[0, head])
            cell = 64 / found.width
            assert window.center == ((layer.stride * column + 0.5) * cell, (layer.stride * row + 0.5) * cell)
            assert window.stage == found.name.split('.')[0]
    assert next(windows, None) is None


@pytest.mark.parametrize(('width', 'height'), [(100, 70), (64, 160), (33, 33)])
def test_cells_have_the_stride_of_their_layer_at_any_size(model, width, height):
    """If the stride does not divide the size, the last cells extend beyond the picture."""
    strides = {info['module']: info['reduction'] for info in model.feature_info}
    stages = list(strides)
    for window in learned_windows(model, View((0, 0, width, height), height, width), (width / 2, height / 2)):
        here, before = strides[window.stage], strides[stages[stages.index(window.stage) - 1]]
        assert window.cell in {(here, here), (before, before)}  # a stage's first layer has the grid before it
        for cell, cells, side in zip(window.cell, window.weights.shape[::-1], (width, height), strict=True):
            assert cells == math.ceil(side / cell)


def test_a_picture_that_the_stride_does_not_divide_is_drawn_to_scale(model, coffee):
    figure = draw_explanation(classifier_of(model, input_size=(3, 100, 160), label_names=None), coffee)
    words = check_legible(figure)
    assert 'input, 160 × 100 px' in words
    reduction = next(info['reduction'] for info in model.feature_info[::-1] if math.ceil(100 / info['reduction']) >= 4)
    assert any(f'{math.ceil(160 / reduction)} × {math.ceil(100 / reduction)} cells' in word for word in words)


def test_an_outline_is_drawn_where_the_weight_has_fallen_to_its_share(model):
    """To e^-1/2 of the query's own weight for a Gaussian, to e^-1 for a Laplacian; in pixels of the input."""
    for window in learned_windows(model, View((0, 0, 64, 64), 64, 64), (32, 32)):
        box = window.outline(window.center).get_extents()
        assert (box.x0 + box.x1) / 2 == pytest.approx(window.center[0])
        laplacian = window.kernel == 'laplacian'
        assert isinstance(window.outline(window.center), Polygon if laplacian else Ellipse)
        row, column = (int(place / side) for place, side in zip(window.center[::-1], window.cell[::-1], strict=True))
        beside = column + (1 if column == 0 else -1)
        reached = box.width / 2 / window.cell[0]  # in cells
        fallen = 1 / reached if laplacian else 0.5 / reached ** 2
        torch.testing.assert_close(
            window.weights[row, beside] / window.weights[row, column], torch.tensor(math.exp(-fallen)),
            rtol=1e-4, atol=1e-30)


def test_a_point_moves_the_windows(nano, coffee):
    """In the figure itself: the first panel shows every layer around the point, each other panel those of its stage."""
    figures = [draw_windows(nano, coffee, point) for point in (None, (200, 150))]
    for figure, point in zip(figures, ((300, 200), (200, 150)), strict=True):
        x, y = to_input(view_of(nano, coffee.size), coffee.size, point)
        first, *stages = figure.axes
        radii = [layer.cells[0] * 64 / layer.width for layer in learned_radii(nano.model, (3, 64, 64))]
        assert (first.get_xlim(), first.get_ylim()) == ((0, 64), (64, 0))
        circles = [patch for patch in first.patches if isinstance(patch, Ellipse)]
        assert [circle.center for circle in circles] == [(pytest.approx(x), pytest.approx(y))] * 3
        assert [circle.width / 2 for circle in circles] == pytest.approx(radii)
        assert [panel.patches[0].width / 2 for panel in stages] == pytest.approx(radii)
    centers = [[panel.patches[0].center for panel in figure.axes[1:]] for figure in figures]
    assert all(before != after for before, after in zip(*centers, strict=True))


def texts_of(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = {text for axes in figure.axes if not axes.axison
              for axis in (axes.xaxis, axes.yaxis) for text in axis.findobj(Text)}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in hidden]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    return [(text.get_text(), box) for text, box in zip(texts, boxes, strict=True) if box.height > 1]  # 1: unplaced


def check_legible(figure):
    """Check that no text overlaps another or the edge, and return the texts."""
    texts = texts_of(figure)
    for (one, box), (other, second) in itertools.combinations(texts, 2):
        assert not box.overlaps(second), (one, other)
    for text, box in texts:
        assert min(box.x0, box.y0) >= 0, text
        assert figure.bbox.containsx(box.x1), text
        assert figure.bbox.containsy(box.y1), text
    return {text for text, _ in texts}


@pytest.mark.parametrize('picture', ['wide', 'tall', 'tiny'])
def test_the_figure_is_legible(nano, coffee, picture):
    image = {'wide': coffee, 'tall': coffee.crop((250, 0, 350, 400)), 'tiny': coffee.resize((3, 2))}[picture]
    words = check_legible(draw_explanation(nano, image))
    guesses = nano(image)
    assert {f'{guess["probability"]:.1%}' for guess in guesses} <= words
    assert any(word.startswith('Grad-CAM: ') for word in words)
    if picture == 'wide':
        assert guesses[0]['name'] == 'espresso'
        assert {'espresso', 'Grad-CAM: espresso', NANO, 'Attention in layer4', 'input, 64 × 64 px'} <= words


def test_any_network_of_the_family_is_drawn(model, coffee):
    classify = classifier_of(model, input_size=(3, 64, 64), label_names=None)
    figure = draw_explanation(classify, coffee, (310, 190))
    words = check_legible(figure)
    stages = {name.split('.')[0] for name, module in model.named_modules() if hasattr(module, 'log_radius')}
    assert {f'Attention in {stage}' for stage in stages} <= words


def test_names_are_drawn_literally_and_whole(nano, coffee, tmp_path):
    """What matplotlib would read as a formula, other scripts, and the longest name in ImageNet."""
    names = ('$_$', 'a$^$b', 'Größe 犬', r'\frac{1}{0}', 'soft-coated wheaten terrier')
    labels = [guess['label'] for guess in nano(coffee)]
    renamed = dict(zip(labels, names, strict=True))
    classify = replace(nano, classes=tuple((label, renamed.get(label, name)) for label, name in nano.classes))
    words = {text.replace(r'\$', '$') for text in check_legible(draw_explanation(classify, coffee))}
    assert {'$_$', 'a$^$b', r'\frac{1}{0}', names[-1], 'Grad-CAM: $_$'} <= words
    save_explanation(classify, coffee, tmp_path / 'names.svg')


@pytest.mark.parametrize('length', [5, 30, 60])
def test_no_title_is_cut_off_or_wider_than_its_panel(nano, coffee, length):
    name = ('the longest name of any class that there is in the world, ' * 2).replace(',', '')[:length].strip()
    figure = draw_explanation(replace(nano, classes=tuple((label, name) for label, _ in nano.classes)), coffee)
    assert f'Grad-CAM: {name}' in check_legible(figure)
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        width = figure.bbox.width / 4
        for text in axes.findobj(Text):
            assert text.get_window_extent(renderer).width <= width, text.get_text()


def test_the_colours_are_explained(nano, coffee):
    """A legend on the panel with all circles gives each stage the colour in which it is drawn."""
    first, *stages = draw_windows(nano, coffee).axes
    legend = first.get_legend()
    assert legend.get_title().get_text() == 'radius of a layer in'
    shown = {text.get_text(): line.get_color() for text, line in zip(
        legend.get_texts(), legend.get_lines(), strict=True)}
    assert list(shown) == ['layer2', 'layer3', 'layer4']
    for panel, (stage, color) in zip(stages, shown.items(), strict=True):
        assert panel.get_title(loc='left') == f'Attention in {stage}'
        assert same_color(panel.patches[0].get_edgecolor(), color)


def test_the_output_is_looked_at_before_a_model_is_loaded(photo, tmp_path, monkeypatch, capsys):
    from timm_geoprior.inference import classifier

    loaded = []
    monkeypatch.setattr(classifier, 'load_model', loaded.append)
    assert main(['explain', photo, '-o', str(tmp_path / 'out.txt')]) == 1
    assert 'must end in .png' in capsys.readouterr().err
    assert not loaded


@pytest.fixture(scope='module')
def resnet(tmp_path_factory):
    """A plain timm network with names for its classes."""
    folder = tmp_path_factory.mktemp('resnet')
    timm.models.save_for_hf(timm.create_model('resnet10t'), folder)
    return f'local-dir:{folder}'


@pytest.mark.parametrize('arguments', [['--layers'], []])
def test_the_command_refuses_a_network_without_attention(photo, tmp_path, capsys, resnet, arguments):
    assert main(['explain', photo, '-o', str(tmp_path / 'out.png'), '--model', resnet, *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ''
    assert 'must be a GeoPrior ResNet, got' in said.err
    assert not (tmp_path / 'out.png').exists()


def test_a_network_without_attention_is_refused(coffee):
    with pytest.raises(GeoPriorError, match='must be a GeoPrior ResNet, got one without attention layers'):
        draw_windows(classifier_of(timm.create_model('resnet18').eval()), coffee)


# -- receptive fields --------------------------------------------------------------------------------------------------

def test_the_plain_network_is_the_resnet_of_the_same_depth():
    with torch.device('meta'):
        plain = _plain_twin(timm.create_model('geoprior_resnet50', num_classes=1000))
        resnet = timm.create_model('resnet50')
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in resnet.state_dict().items()}


def test_attention_reaches_beyond_the_convolutions(nano):
    state = {name: value.clone() for name, value in nano.model.state_dict().items()}
    own, plain = receptive_pair(nano.model, 257)
    assert all(torch.equal(value, state[name]) for name, value in nano.model.state_dict().items())
    reach = [int(field.nonzero().sub(128).abs().max()) for field in (own, plain)]
    assert reach[0] == 128
    assert reach[1] < 64
    again = receptive_pair(nano.model, 257)
    assert torch.equal(again[0], own)
    assert torch.equal(again[1], plain)


def texts_by_panel(figure):
    return {axes.get_title(loc='left'): [text.get_text() for text in axes.texts] for axes in figure.axes}


def test_fields_that_differ_are_shown_beside_each_other(nano, coffee):
    panels = texts_by_panel(draw_explanation(nano, coffee))
    reach, plain = (int(re.search(r'99% of it within (\d+) px', ' '.join(panels[title]))[1])
                    for title in ('Receptive field: GeoPrior', 'Receptive field: plain ResNet'))
    assert reach > 1.5 * plain
    assert 'Reach of each layer' not in panels


def test_fields_that_look_alike_give_way_to_the_reach_of_each_layer(coffee):
    """A small radius adds nothing to what the convolutions of a stage see, as the numbers show."""
    torch.manual_seed(0)
    model = timm.create_model('geoprior_resnet14_nano', attn_radius=0.4).eval()
    figure = draw_explanation(classifier_of(model, input_size=(3, 64, 64), label_names=None), coffee)
    panels = texts_by_panel(figure)
    reach, plain = map(int, re.search(
        r'99% of it within (\d+) px\nplain ResNet: (\d+) px', '|'.join(panels['Receptive field: GeoPrior'])).groups())
    assert reach == pytest.approx(plain, rel=0.1)
    assert 'Receptive field: plain ResNet' not in panels
    axes = next(axes for axes in figure.axes if axes.get_title(loc='left') == 'Reach of each layer')
    cells = [64 / layer.width for layer in learned_radii(model, (3, 64, 64))]
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([0.4 * cell for cell in cells])
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1.5 * cell for cell in cells])


def test_a_wider_window_makes_a_wider_field(nano):
    noise = torch.randn(2, 3, 129, 129, generator=torch.Generator().manual_seed(0))
    distance = (torch.arange(129) - 64).abs()
    means = []
    for radius in (0.3, 1.0, 3.0):
        torch.manual_seed(0)
        model = timm.create_model('geoprior_resnet14_nano', attn_radius=radius, zero_init_last=False).eval()
        field = effective_field(model, noise)
        means.append(float((field.sum(0) * distance).sum() / field.sum()))
    assert means[0] < means[1] < means[2]


# -- the command -------------------------------------------------------------------------------------------------------

@pytest.fixture
def photo(coffee, tmp_path):
    coffee.save(tmp_path / 'coffee.png')
    return str(tmp_path / 'coffee.png')


@pytest.mark.parametrize('ending', ['png', 'pdf'])
def test_the_command_writes_one_file(photo, tmp_path, capsys, ending):
    path = tmp_path / f'out.{ending}'
    assert main(['explain', photo, '-o', str(path), '--point', '300,150', '--model', NANO]) == 0
    assert capsys.readouterr().out == f'Wrote {path}.\n'
    assert {entry.name for entry in tmp_path.iterdir()} == {'coffee.png', path.name}
    if ending == 'png':
        with Image.open(path) as image:
            assert image.width > 1500
            assert np.asarray(image.convert('L')).std() > 30
    else:
        assert path.read_bytes().startswith(b'%PDF')


def test_the_table_of_layers(nano, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)  # not needed for it
    assert main(['explain', '--layers', '--model', NANO]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == f'{NANO} at 64 x 64 px'
    for row, layer in zip(rows, learned_radii(nano.model, (3, 64, 64)), strict=True):
        cell = 64 // layer.height
        assert re.split(r'  +', row) == [
            layer.name, f'{layer.height} x {layer.width}', str(cell), f'{layer.cells[0]:.2f}',
            f'{cell * layer.cells[0]:.1f}']


@pytest.mark.parametrize(('arguments', 'words'), [
    (['--point', '600.5,10'], 'The point must be in the picture (x from 0 to 600, y from 0 to 400), got 600.5,10.'),
    (['--point', '300,nan'], 'The point must be in the picture (x from 0 to 600, y from 0 to 400), got 300,nan.'),
    (['--point', '10,200'], 'The point must be in the part of the picture that the network sees (x from 100 to '),
    (['-o', 'out.txt'], 'The output must end in .png, .jpg, .pdf or .svg, got out.txt.'),
    (['-o', 'out.pgf'], 'The output must end in .png, .jpg, .pdf or .svg, got out.pgf.'),
    (['-o', 'out'], 'The output must end in .png, .jpg, .pdf or .svg, got out.'),
    (['-o', 'nowhere/out.png'], 'The output must be in a folder that exists, got nowhere/out.png.'),
    (['-o', 'folder.png'], 'The output must be a file, got the folder folder.png. Name a file in it.'),
    (['--model', 'geoprior_resnet101.paper_in1k'], 'geoprior_resnet101.paper_in1k'),
    (['--model', 'local-dir:nowhere'], 'The model local-dir:nowhere cannot be created'),
])
def test_an_error_is_one_sentence_and_nothing_is_written(photo, tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / 'folder.png').mkdir()
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert main(['explain', photo, *arguments]) == 1
    assert capsys.readouterr().err.startswith(f'timm-geoprior: {words}')
    assert set(tmp_path.iterdir()) == before


def test_the_photograph_is_not_replaced(photo, tmp_path, capsys):
    copy = tmp_path / 'photo.png'
    Image.open(photo).save(copy)
    content = copy.read_bytes()
    (tmp_path / 'link.png').symlink_to(copy)
    for output in (copy, tmp_path / 'link.png'):
        assert main(['explain', str(copy), '-o', str(output)]) == 1
        assert 'The output must be a file other than the image' in capsys.readouterr().err
    assert copy.read_bytes() == content


@pytest.mark.parametrize(('content', 'words'), [
    (b'words', 'is not an image that Pillow can read'), (None, 'does not exist'), ('huge', 'must have at most')])
def test_a_bad_image_is_one_sentence(tmp_path, capsys, content, words):
    path = tmp_path / 'picture.png'
    if content == 'huge':
        Image.new('1', (20_000, 20_000)).save(path)
    elif content:
        path.write_bytes(content)
    assert main(['explain', str(path), '-o', str(tmp_path / 'out.png')]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / 'out.png').exists()


@pytest.mark.parametrize('package', ['matplotlib', 'pytorch_grad_cam'])
def test_a_missing_extra_names_its_cure(photo, monkeypatch, capsys, package):
    for name in [name for name in sys.modules if name.split('.')[0] == package or name in (
            'timm_geoprior.inference.explain', 'timm_geoprior.inference.windows')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(['explain', photo]) == 1
    assert capsys.readouterr().err.endswith("which is not installed. Run `pip install 'timm-geoprior[explain]'`.\n")


@pytest.mark.parametrize('point', ['1', '1,2,3', 'a,b', '1;2'])
def test_a_point_is_two_numbers(photo, capsys, point):
    with pytest.raises(SystemExit) as stopped:
        main(['explain', photo, '--point', point])
    assert stopped.value.code == 2
    assert f'must be X,Y in pixels, such as 120,80, got {point!r}' in capsys.readouterr().err
