//! The objects that scenes are made of.

use crate::canvas::{Canvas, Rgb, shade};

/// An everyday object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Object {
    /// A mug with a handle.
    Mug,
    /// An apple with a leaf.
    Apple,
    /// A house with a red roof.
    House,
    /// A car seen from its side.
    Car,
    /// A tree with a round crown.
    Tree,
    /// A fish.
    Fish,
    /// An open umbrella.
    Umbrella,
    /// A sailing boat.
    Boat,
    /// A flower with petals.
    Flower,
    /// A round clock.
    Clock,
}

const BLACK: Rgb = [0.08, 0.08, 0.1];
const WHITE: Rgb = [0.96, 0.96, 0.94];
const GREEN: Rgb = [0.2, 0.55, 0.22];
const BROWN: Rgb = [0.42, 0.27, 0.15];
const GLASS: Rgb = [0.7, 0.85, 0.93];

impl Object {
    /// Every object.
    pub const ALL: [Self; 10] = [
        Self::Mug,
        Self::Apple,
        Self::House,
        Self::Car,
        Self::Tree,
        Self::Fish,
        Self::Umbrella,
        Self::Boat,
        Self::Flower,
        Self::Clock,
    ];

    /// Name for class lists and file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mug => "mug",
            Self::Apple => "apple",
            Self::House => "house",
            Self::Car => "car",
            Self::Tree => "tree",
            Self::Fish => "fish",
            Self::Umbrella => "umbrella",
            Self::Boat => "boat",
            Self::Flower => "flower",
            Self::Clock => "clock",
        }
    }

    /// Draws the object inside `-1..=1`; `tint` colours the parts that vary.
    pub(crate) fn draw(self, c: &mut Canvas<'_>, tint: Rgb) {
        match self {
            Self::Mug => mug(c, tint),
            Self::Apple => apple(c, tint),
            Self::House => house(c, tint),
            Self::Car => car(c, tint),
            Self::Tree => tree(c, tint),
            Self::Fish => fish(c, tint),
            Self::Umbrella => umbrella(c, tint),
            Self::Boat => boat(c, tint),
            Self::Flower => flower(c, tint),
            Self::Clock => clock(c, tint),
        }
    }
}

fn mug(c: &mut Canvas<'_>, tint: Rgb) {
    c.line(
        (0.45, -0.35),
        &[[1.05, -0.4, 0.95, 0.1], [0.85, 0.5, 0.45, 0.4]],
        0.16,
        shade(tint, 0.8),
    );
    c.rect(-0.7, -0.6, 1.2, 1.25, tint);
    c.ellipse(-0.1, 0.65, 0.6, 0.2, tint);
    c.rect(-0.7, -0.6, 0.25, 1.25, shade(tint, 1.2));
    c.ellipse(-0.1, -0.6, 0.6, 0.2, shade(tint, 0.75));
    c.ellipse(-0.1, -0.57, 0.52, 0.15, [0.25, 0.14, 0.07]);
}

fn apple(c: &mut Canvas<'_>, tint: Rgb) {
    let skin = [0.55 + 0.4 * tint[0], 0.15 + 0.25 * tint[1], 0.12];
    c.ellipse(-0.28, 0.1, 0.55, 0.7, skin);
    c.ellipse(0.28, 0.1, 0.55, 0.7, shade(skin, 0.9));
    c.ellipse(-0.4, -0.12, 0.16, 0.24, shade(skin, 1.35));
    c.line((0.0, -0.45), &[[0.0, -0.8, 0.12, -0.95]], 0.1, BROWN);
    c.curve(
        (0.05, -0.65),
        &[[0.4, -1.05, 0.7, -0.75], [0.4, -0.5, 0.05, -0.65]],
        GREEN,
    );
}

fn house(c: &mut Canvas<'_>, tint: Rgb) {
    let wall = shade(tint, 0.5).map(|v| v + 0.45);
    c.rect(0.35, -0.85, 0.22, 0.5, [0.45, 0.25, 0.2]);
    c.rect(-0.75, -0.1, 1.5, 1.05, wall);
    c.polygon(
        &[(-0.95, -0.05), (0.0, -0.9), (0.95, -0.05)],
        [0.7, 0.22, 0.16],
    );
    c.rect(-0.15, 0.35, 0.34, 0.6, BROWN);
    for x in [-0.6, 0.32] {
        c.rect(x, 0.12, 0.3, 0.32, GLASS);
        c.rect(x + 0.13, 0.12, 0.04, 0.32, WHITE);
        c.rect(x, 0.26, 0.3, 0.04, WHITE);
    }
}

fn car(c: &mut Canvas<'_>, tint: Rgb) {
    c.curve(
        (-0.55, -0.05),
        &[[-0.4, -0.55, -0.05, -0.55], [0.35, -0.55, 0.55, -0.05]],
        tint,
    );
    c.curve(
        (-0.42, -0.07),
        &[[-0.33, -0.43, -0.05, -0.45], [-0.04, -0.2, -0.05, -0.07]],
        GLASS,
    );
    c.curve(
        (0.03, -0.07),
        &[[0.0, -0.3, 0.03, -0.45], [0.28, -0.4, 0.42, -0.07]],
        GLASS,
    );
    c.curve(
        (-0.98, 0.4),
        &[
            [-1.0, -0.05, -0.55, -0.07],
            [0.2, -0.1, 0.6, -0.05],
            [1.0, 0.0, 0.98, 0.4],
        ],
        tint,
    );
    c.rect(0.84, 0.1, 0.13, 0.12, [1.0, 0.9, 0.5]);
    for x in [-0.55, 0.55] {
        c.ellipse(x, 0.4, 0.26, 0.26, BLACK);
        c.ellipse(x, 0.4, 0.12, 0.12, [0.75, 0.75, 0.77]);
    }
}

fn tree(c: &mut Canvas<'_>, tint: Rgb) {
    let leaf = [0.12 + 0.2 * tint[0], 0.38 + 0.25 * tint[1], 0.14];
    c.polygon(&[(-0.12, 0.0), (0.12, 0.0), (0.2, 1.0), (-0.2, 1.0)], BROWN);
    for (x, y, r, by) in [
        (-0.4, -0.1, 0.42, 0.85),
        (0.4, -0.1, 0.42, 0.8),
        (0.0, -0.5, 0.5, 1.1),
        (0.0, -0.05, 0.45, 1.0),
    ] {
        c.ellipse(x, y, r, r, shade(leaf, by));
    }
}

fn fish(c: &mut Canvas<'_>, tint: Rgb) {
    c.polygon(
        &[(0.45, 0.0), (1.0, -0.45), (0.85, 0.0), (1.0, 0.45)],
        shade(tint, 0.8),
    );
    c.curve((-0.1, -0.35), &[[0.1, -0.8, 0.35, -0.2]], shade(tint, 0.7));
    c.curve(
        (-0.98, 0.0),
        &[[-0.3, -0.75, 0.6, 0.0], [-0.3, 0.75, -0.98, 0.0]],
        tint,
    );
    for x in [-0.25, 0.0, 0.25] {
        c.line(
            (x, -0.2),
            &[[x + 0.15, 0.0, x, 0.2]],
            0.05,
            shade(tint, 0.75),
        );
    }
    c.ellipse(-0.62, -0.08, 0.11, 0.11, WHITE);
    c.ellipse(-0.64, -0.08, 0.05, 0.05, BLACK);
}

fn umbrella(c: &mut Canvas<'_>, tint: Rgb) {
    c.line(
        (0.0, -0.8),
        &[
            [0.0, 0.0, 0.0, 0.65],
            [0.0, 0.95, 0.25, 0.92],
            [0.4, 0.9, 0.38, 0.68],
        ],
        0.09,
        BROWN,
    );
    c.curve(
        (-0.98, 0.0),
        &[
            [-0.9, -0.9, 0.0, -0.9],
            [0.9, -0.9, 0.98, 0.0],
            [0.65, -0.25, 0.33, 0.0],
            [0.0, -0.25, -0.33, 0.0],
            [-0.65, -0.25, -0.98, 0.0],
        ],
        tint,
    );
    c.curve(
        (-0.33, 0.0),
        &[
            [-0.25, -0.7, 0.0, -0.9],
            [0.25, -0.7, 0.33, 0.0],
            [0.0, -0.25, -0.33, 0.0],
        ],
        shade(tint, 1.3),
    );
}

fn boat(c: &mut Canvas<'_>, tint: Rgb) {
    c.rect(-0.05, -0.95, 0.09, 1.3, BROWN);
    c.curve(
        (0.08, -0.9),
        &[[0.75, -0.3, 0.8, 0.25], [0.4, 0.2, 0.08, 0.25]],
        WHITE,
    );
    c.curve(
        (-0.1, -0.75),
        &[[-0.6, -0.2, -0.7, 0.25], [-0.4, 0.2, -0.1, 0.25]],
        shade(WHITE, 0.88),
    );
    c.curve(
        (-0.95, 0.35),
        &[
            [0.0, 0.45, 0.95, 0.35],
            [0.8, 0.85, 0.5, 0.9],
            [0.0, 0.95, -0.5, 0.9],
            [-0.8, 0.85, -0.95, 0.35],
        ],
        tint,
    );
    c.rect(-0.85, 0.48, 1.7, 0.08, WHITE);
}

fn flower(c: &mut Canvas<'_>, tint: Rgb) {
    c.line((0.0, -0.2), &[[0.1, 0.4, 0.0, 0.98]], 0.1, GREEN);
    c.curve(
        (0.03, 0.6),
        &[[0.5, 0.2, 0.65, 0.35], [0.5, 0.65, 0.03, 0.6]],
        GREEN,
    );
    for i in 0..6 {
        let (sin, cos) = (i as f32 * std::f32::consts::TAU / 6.0).sin_cos();
        c.ellipse(
            0.36 * cos,
            -0.38 + 0.36 * sin,
            0.25,
            0.25,
            shade(tint, 0.9 + 0.05 * (i % 3) as f32),
        );
    }
    c.ellipse(0.0, -0.38, 0.22, 0.22, [0.97, 0.8, 0.2]);
}

fn clock(c: &mut Canvas<'_>, tint: Rgb) {
    c.ellipse(0.0, 0.0, 0.92, 0.92, tint);
    c.ellipse(0.0, 0.0, 0.76, 0.76, WHITE);
    for i in 0..12 {
        let (sin, cos) = (i as f32 * std::f32::consts::TAU / 12.0).sin_cos();
        c.line(
            (0.58 * cos, 0.58 * sin),
            &[[0.64 * cos, 0.64 * sin, 0.69 * cos, 0.69 * sin]],
            0.06,
            BLACK,
        );
    }
    c.line((0.0, 0.0), &[[0.0, -0.25, 0.0, -0.5]], 0.08, BLACK);
    c.line((0.0, 0.0), &[[0.15, 0.1, 0.32, 0.2]], 0.1, BLACK);
    c.ellipse(0.0, 0.0, 0.08, 0.08, [0.75, 0.15, 0.12]);
}
