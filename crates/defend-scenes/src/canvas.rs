//! Shapes in the coordinates of one object: `-1..=1` in both directions, y downwards.

use tiny_skia::{Color, FillRule, Paint, PathBuilder, Pixmap, Rect, Stroke, Transform};

/// Red, green and blue, `0..=1`.
pub(crate) type Rgb = [f32; 3];

/// Draws on an image in an object's own coordinates.
pub(crate) struct Canvas<'a> {
    pub(crate) pixels: &'a mut Pixmap,
    pub(crate) transform: Transform,
}

/// The colour, lighter (`by` above 1) or darker.
pub(crate) fn shade(colour: Rgb, by: f32) -> Rgb {
    colour.map(|c| (c * by).clamp(0.0, 1.0))
}

fn paint(colour: Rgb) -> Paint<'static> {
    let [r, g, b] = colour.map(|c| (c.clamp(0.0, 1.0) * 255.0).round() as u8);
    let mut paint = Paint::default();
    paint.set_color(Color::from_rgba8(r, g, b, 255));
    paint.anti_alias = true;
    paint
}

impl Canvas<'_> {
    fn fill(&mut self, path: Option<tiny_skia::Path>, colour: Rgb) {
        if let Some(path) = path {
            let rule = FillRule::Winding;
            self.pixels
                .fill_path(&path, &paint(colour), rule, self.transform, None);
        }
    }

    pub(crate) fn polygon(&mut self, points: &[(f32, f32)], colour: Rgb) {
        let mut path = PathBuilder::new();
        for (i, &(x, y)) in points.iter().enumerate() {
            if i == 0 {
                path.move_to(x, y);
            } else {
                path.line_to(x, y);
            }
        }
        path.close();
        self.fill(path.finish(), colour);
    }

    pub(crate) fn rect(&mut self, x: f32, y: f32, width: f32, height: f32, colour: Rgb) {
        let path = Rect::from_xywh(x, y, width, height).map(PathBuilder::from_rect);
        self.fill(path, colour);
    }

    pub(crate) fn ellipse(&mut self, x: f32, y: f32, radius_x: f32, radius_y: f32, colour: Rgb) {
        let bounds = Rect::from_xywh(x - radius_x, y - radius_y, 2.0 * radius_x, 2.0 * radius_y);
        self.fill(bounds.and_then(PathBuilder::from_oval), colour);
    }

    /// A closed outline of quadratic curves: pairs of control point and end point after the start.
    pub(crate) fn curve(&mut self, start: (f32, f32), curves: &[[f32; 4]], colour: Rgb) {
        let mut path = PathBuilder::new();
        path.move_to(start.0, start.1);
        for &[cx, cy, x, y] in curves {
            path.quad_to(cx, cy, x, y);
        }
        path.close();
        self.fill(path.finish(), colour);
    }

    /// An open line of quadratic curves with round ends.
    pub(crate) fn line(&mut self, start: (f32, f32), curves: &[[f32; 4]], width: f32, colour: Rgb) {
        let mut path = PathBuilder::new();
        path.move_to(start.0, start.1);
        for &[cx, cy, x, y] in curves {
            path.quad_to(cx, cy, x, y);
        }
        if let Some(path) = path.finish() {
            let stroke = Stroke {
                width,
                line_cap: tiny_skia::LineCap::Round,
                ..Stroke::default()
            };
            self.pixels
                .stroke_path(&path, &paint(colour), &stroke, self.transform, None);
        }
    }
}
