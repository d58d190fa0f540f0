//! One scene: a background and objects that do not hide each other.

use defend_data::RgbImage;
use defend_random::Rng;
use image::Rgb;
use rand::RngExt;
use tiny_skia::{Pixmap, Transform};

use crate::canvas::Canvas;
use crate::{Error, Object};

/// An object in a scene.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placed {
    /// Which.
    pub object: Object,
    /// Its centre, pixels.
    pub centre: [f32; 2],
    /// Half its size, pixels.
    pub radius: f32,
}

/// A rendered image and what it shows.
#[derive(Debug, Clone)]
pub struct Scene {
    /// The image.
    pub image: RgbImage,
    /// What it shows, in drawing order.
    pub objects: Vec<Placed>,
}

/// Tries to find a free place before an object may overlap another.
const ATTEMPTS: usize = 60;

/// Renders the objects on a square image of `size` pixels, each at a random place, size, tilt and
/// tint, over a random background.
///
/// # Errors
/// [`Error::Config`] for a size outside `32..=4096`.
pub fn render(objects: &[Object], size: u32, rng: &mut Rng) -> Result<Scene, Error> {
    let pixels = (32..=4096)
        .contains(&size)
        .then(|| Pixmap::new(size, size))
        .flatten();
    let mut pixels = pixels.ok_or_else(|| Error::Config {
        field: "size",
        value: size.to_string(),
        expected: "a size in pixels in 32..=4096".into(),
    })?;
    background(&mut pixels, rng);
    let mut placed: Vec<Placed> = Vec::new();
    for &object in objects {
        let place = find_place(object, size as f32, &placed, rng);
        let tint = [(); 3].map(|()| rng.random_range(0.15..0.95));
        let tilt = rng.random_range(-18.0..18.0);
        let flip = if rng.random::<bool>() { -1.0 } else { 1.0 };
        let transform = Transform::from_translate(place.centre[0], place.centre[1])
            .pre_rotate(tilt)
            .pre_scale(flip * place.radius, place.radius);
        object.draw(
            &mut Canvas {
                pixels: &mut pixels,
                transform,
            },
            tint,
        );
        placed.push(place);
    }
    // Sensor noise, so that flat areas are not exactly flat.
    let data = pixels.data();
    let image = RgbImage::from_fn(size, size, |x, y| {
        let at = 4 * (y * size + x) as usize;
        let noise: i16 = rng.random_range(-5..=5);
        let channel = |i: usize| {
            let value = data.get(at + i).copied().unwrap_or(0);
            (i16::from(value) + noise).clamp(0, 255) as u8
        };
        Rgb([channel(0), channel(1), channel(2)])
    });
    Ok(Scene {
        image,
        objects: placed,
    })
}

fn find_place(object: Object, size: f32, placed: &[Placed], rng: &mut Rng) -> Placed {
    let mut last = Placed {
        object,
        centre: [size / 2.0; 2],
        radius: size / 8.0,
    };
    for attempt in 0..ATTEMPTS {
        // Smaller the longer it takes, so that a crowded scene still finds room.
        let shrink = 1.0 - 0.4 * attempt as f32 / ATTEMPTS as f32;
        let radius = size * rng.random_range(0.15..0.24) * shrink;
        let centre = [(); 2].map(|()| rng.random_range(radius..size - radius));
        last = Placed {
            object,
            centre,
            radius,
        };
        let free = placed.iter().all(|other| {
            let (dx, dy) = (other.centre[0] - centre[0], other.centre[1] - centre[1]);
            dx.hypot(dy) > 0.95 * (other.radius + radius)
        });
        if free {
            break;
        }
    }
    last
}

/// Two areas that meet at a horizon, each with a vertical gradient.
fn background(pixels: &mut Pixmap, rng: &mut Rng) {
    let size = pixels.height() as f32;
    let horizon = size * rng.random_range(0.35..0.75);
    let mut colours = [[0.0f32; 3]; 2];
    for colour in &mut colours {
        let grey: f32 = rng.random_range(0.35..0.85);
        *colour = [(); 3].map(|()| (grey + rng.random_range(-0.15..0.15)).clamp(0.0, 1.0));
    }
    let slope: f32 = rng.random_range(-0.25..0.25);
    let strip = 4.0;
    let mut canvas = Canvas {
        pixels,
        transform: Transform::identity(),
    };
    for row in 0..(size / strip).ceil() as usize {
        let y = row as f32 * strip;
        let colour = if y < horizon { colours[0] } else { colours[1] };
        let light = 1.0 + slope * (y / size - 0.5);
        canvas.rect(0.0, y, size, strip, crate::canvas::shade(colour, light));
    }
}
