"Make the home page's figures: `python nbs/_figures.py RUN`, RUN a run folder."
import io, shutil, sys
from pathlib import Path

from PIL import Image
from reid_fastai.data.render import Pedestrian, SynthCamera, render_pedestrian

def pedestrians(n=12, rows=3, gap=4):
    "Contact sheet: a person a column, a camera a row"
    cams = [SynthCamera(c) for c in (3, 6, 1)][:rows]
    sheet = Image.new('RGB', (n*(64+gap)-gap, rows*(128+gap)-gap), 'white')
    for i in range(n):
        for j,c in enumerate(cams):
            im = Image.open(io.BytesIO(render_pedestrian(Pedestrian(i+3), c, rng=[i, j])))
            sheet.paste(im, (i*(64+gap), j*(128+gap)))
    return sheet

if __name__=='__main__':
    images = Path(__file__).parent/'images'
    images.mkdir(exist_ok=True)
    pedestrians().save(images/'pedestrians.png')
    shutil.copy(Path(sys.argv[1])/'lambda_hist.png', images)
