// What is done with hostile input: each takes any bytes and has to come back, without a panic, in bounded time and memory. Shared by the
// fuzz targets (cargo fuzz, by hand) and by tests that feed them changed files (examples/tests/hostile.rs, in CI).

use std::path::{Path, PathBuf};

use defend_bench::{BenchConfig, Record};
use defend_core::data::{
    Cifar, Coco, Crowd, Dataset, Difficult, Idx, ListedPaths, Manifest, MvtecAd, Split, Voc,
    decode_image, decode_image_at_least,
};
use defend_core::vit::Weights;
use defend_core::{Background, DefendConfig, Detector, Device};

/// A target's name, and what it does.
pub(crate) type Body = (&'static str, fn(&[u8]));

pub(crate) const BODIES: [Body; 14] = [
    ("model", model),
    ("background", background),
    ("weights", weights),
    ("settings", settings),
    ("bench_config", bench_config),
    ("record", record),
    ("idx", idx),
    ("cifar", cifar),
    ("voc_xml", voc_xml),
    ("coco_json", coco_json),
    ("manifest_csv", manifest_csv),
    ("manifest_json", manifest_json),
    ("image", image),
    ("mask", mask),
];

pub(crate) fn model(bytes: &[u8]) {
    let _ = Detector::from_bytes(bytes, "input", &Device::Cpu);
}

pub(crate) fn background(bytes: &[u8]) {
    let _ = Background::from_bytes(bytes, "input");
}

/// Safetensors, archives and streams of pickles.
pub(crate) fn weights(bytes: &[u8]) {
    let _ = Weights::from_bytes(bytes, "input");
}

pub(crate) fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(config) = toml::from_str::<DefendConfig>(text) {
        let _ = config.validate();
    }
    if let Ok(config) = serde_json::from_str::<DefendConfig>(text) {
        let _ = config.validate();
    }
}

pub(crate) fn bench_config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = BenchConfig::parse(text, Path::new("input"), None);
    }
}

pub(crate) fn record(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Record>(bytes);
}

/// Bytes in a file of a folder of its own, which lies in memory where there is such a place.
struct File(tempfile::TempDir);

impl File {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        let file = Self(folder.expect("a folder"));
        file.put(name, bytes);
        file
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, bytes).expect("a file");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// Looks at the first images of a set.
fn look(set: Result<impl Dataset, defend_core::data::Error>) {
    if let Ok(set) = set {
        for index in 0..set.len().min(2) {
            let _ = (
                set.image(index),
                set.classes(index).len(),
                set.boxes(index).len(),
            );
            let _ = set.mask(index);
        }
    }
}

pub(crate) fn idx(bytes: &[u8]) {
    // Images and labels, one behind the other: the first two bytes say where the labels begin.
    let (at, rest) = bytes.split_at(bytes.len().min(2));
    let at = at
        .iter()
        .fold(0, |at, byte| at << 8 | usize::from(*byte))
        .min(rest.len());
    let (images, labels) = rest.split_at(at);
    let file = File::new("t10k-images-idx3-ubyte", images);
    file.put("t10k-labels-idx1-ubyte", labels);
    look(Idx::mnist(file.path(""), Split::Test));
}

pub(crate) fn cifar(bytes: &[u8]) {
    let file = File::new("test_batch.bin", bytes);
    file.put("batches.meta.txt", b"a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n");
    look(Cifar::cifar10(file.path(""), Split::Test));
}

pub(crate) fn voc_xml(bytes: &[u8]) {
    let file = File::new("Annotations/a.xml", bytes);
    file.put("ImageSets/Main/train.txt", b"a\n");
    file.put("JPEGImages/a.jpg", b"");
    look(Voc::open(file.path(""), "train", Difficult::Counted));
}

pub(crate) fn coco_json(bytes: &[u8]) {
    let file = File::new("instances.json", bytes);
    file.put("1.jpg", b"");
    look(Coco::open(
        file.path("instances.json"),
        file.path(""),
        Crowd::Counted,
    ));
}

pub(crate) fn manifest_csv(bytes: &[u8]) {
    let file = File::new("list.csv", bytes);
    file.put("1.jpg", b"");
    look(Manifest::open(
        file.path("list.csv"),
        None,
        ListedPaths::Inside,
    ));
}

pub(crate) fn manifest_json(bytes: &[u8]) {
    let file = File::new("list.json", bytes);
    file.put("1.jpg", b"");
    look(Manifest::open(
        file.path("list.json"),
        None,
        ListedPaths::Inside,
    ));
}

pub(crate) fn image(bytes: &[u8]) {
    // Headers may promise a gigabyte, which is allowed and slow.
    if let Ok(decoder) = image::ImageReader::new(std::io::Cursor::new(bytes)).with_guessed_format()
        && decoder
            .into_dimensions()
            .is_ok_and(|(width, height)| u64::from(width) * u64::from(height) > 1 << 22)
    {
        return;
    }
    let _ = decode_image(bytes, "input");
    let _ = decode_image_at_least(bytes, "input", [16, 16]);
}

pub(crate) fn mask(bytes: &[u8]) {
    let file = File::new("ground_truth/bad/1_mask.png", bytes);
    let mut png = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::new(8, 8);
    picture
        .write_to(&mut png, image::ImageFormat::Png)
        .expect("a PNG");
    file.put("test/bad/1.png", png.get_ref());
    file.put("test/good/1.png", png.get_ref());
    look(MvtecAd::open(file.path(""), Split::Test));
}
