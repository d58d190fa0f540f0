//! Tables of features as Parquet, for tools that read columns.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use defend_core::evidence::Embeddings;
use defend_core::{FeatureTable, TeacherIdentity};
use ndarray::Array2;
use parquet::basic::Compression;
use parquet::column::reader::ColumnReader;
use parquet::data_type::{ByteArray, ByteArrayType, FloatType};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

/// Key of the teacher's identity in the file's metadata, as JSON.
const TEACHER: &str = "defend.teacher";
/// Columns of a teacher's tokens, as `FeatureTable::save` names them; a teacher of a single block has the last two.
const PARTS: [&str; 3] = ["cls_before", "cls", "mean_patch"];
/// The others at unit length as one row.
const PHI: &str = "phi";

/// Writes names, hashes and features, a row an image.
pub(crate) fn write(table: &FeatureTable, out: &Path) -> Result<()> {
    let parts = table.embeddings().parts();
    let names = &PARTS[PARTS.len().saturating_sub(parts.len())..];
    let phi = table.embeddings().phi(1.0).mapv(|value| value as f32);
    let columns: Vec<(&str, &Array2<f32>)> = names
        .iter()
        .copied()
        .zip(parts)
        .chain([(PHI, &phi)])
        .collect();
    let lists: String = columns
        .iter()
        .map(|(name, _)| {
            format!("required group {name} (LIST) {{ repeated group list {{ required float element; }} }} ")
        })
        .collect();
    let schema = format!(
        "message features {{ required binary path (UTF8); required binary hash (UTF8); {lists}}}"
    );
    let teacher = KeyValue::new(TEACHER.into(), serde_json::to_string(table.teacher())?);
    let properties = WriterProperties::builder()
        .set_compression(Compression::UNCOMPRESSED)
        .set_dictionary_enabled(false)
        .set_key_value_metadata(Some(vec![teacher]))
        .build();
    // The file appears whole or not at all.
    let partial = out.with_extension("parquet.part");
    let file = File::create(&partial).with_context(|| format!("cannot write {}", out.display()))?;
    let schema = Arc::new(parse_message_type(&schema)?);
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    for texts in [table.names(), table.hashes()] {
        let texts: Vec<ByteArray> = texts.iter().map(|text| text.as_str().into()).collect();
        let mut column = group.next_column()?.context("a column is missing")?;
        column
            .typed::<ByteArrayType>()
            .write_batch(&texts, None, None)?;
        column.close()?;
    }
    for (_, rows) in columns {
        write_lists(&mut group, rows)?;
    }
    group.close()?;
    writer.close()?;
    std::fs::rename(&partial, out).with_context(|| format!("cannot write {}", out.display()))
}

fn write_lists(group: &mut SerializedRowGroupWriter<'_, File>, rows: &Array2<f32>) -> Result<()> {
    let values: Vec<f32> = rows.iter().copied().collect();
    let width = rows.ncols();
    // A value is there, and the first of each row begins a list.
    let there = vec![1; values.len()];
    let begins: Vec<i16> = (0..values.len())
        .map(|i| i16::from(i % width != 0))
        .collect();
    let mut column = group.next_column()?.context("a column is missing")?;
    column
        .typed::<FloatType>()
        .write_batch(&values, Some(&there), Some(&begins))?;
    column.close()?;
    Ok(())
}

/// Reads what [`write()`] wrote.
pub(crate) fn read(path: &Path) -> Result<FeatureTable> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let reader = SerializedFileReader::new(file)
        .with_context(|| format!("{} is no Parquet file", path.display()))?;
    let said = || format!("{} is no table of features of defend embed", path.display());
    let metadata = reader.metadata().file_metadata();
    let teacher = metadata
        .key_value_metadata()
        .and_then(|pairs| pairs.iter().find(|pair| pair.key == TEACHER))
        .and_then(|pair| pair.value.as_deref())
        .with_context(said)?;
    let teacher: TeacherIdentity = serde_json::from_str(teacher).with_context(said)?;
    let names = texts(&reader, "path").with_context(said)?;
    let hashes = texts(&reader, "hash").with_context(said)?;
    let there = |name: &&str| {
        let columns = metadata.schema_descr().columns().iter();
        let mut names = columns.filter_map(|column| column.path().parts().first());
        names.any(|found| found == name)
    };
    // By name: other tools may write the columns in another order.
    let parts = PARTS
        .into_iter()
        .filter(there)
        .map(|name| lists(&reader, name, names.len()))
        .collect::<Result<_>>()
        .with_context(said)?;
    let embeddings = Embeddings::new(parts).with_context(said)?;
    FeatureTable::new(teacher, names, hashes, embeddings).with_context(said)
}

/// Column readers of this name, one a row group, with the number of their rows.
fn columns(reader: &SerializedFileReader<File>, name: &str) -> Result<Vec<(ColumnReader, usize)>> {
    let schema = reader.metadata().file_metadata().schema_descr();
    let place = (0..schema.num_columns())
        .find(|&i| schema.column(i).path().parts().first().map(String::as_str) == Some(name));
    let place = place.with_context(|| format!("no column {name:?}"))?;
    let groups = 0..reader.num_row_groups();
    groups
        .map(|group| {
            let group = reader.get_row_group(group)?;
            let rows = usize::try_from(group.metadata().num_rows())?;
            Ok((group.get_column_reader(place)?, rows))
        })
        .collect()
}

fn texts(reader: &SerializedFileReader<File>, name: &str) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for (column, rows) in columns(reader, name)? {
        let ColumnReader::ByteArrayColumnReader(mut column) = column else {
            bail!("column {name:?} is no text");
        };
        let mut values = Vec::new();
        column.read_records(rows, None, None, &mut values)?;
        for value in values {
            texts.push(value.as_utf8()?.to_owned());
        }
    }
    Ok(texts)
}

fn lists(reader: &SerializedFileReader<File>, name: &str, rows: usize) -> Result<Array2<f32>> {
    let (mut values, mut begins) = (Vec::new(), Vec::new());
    for (column, rows) in columns(reader, name)? {
        let ColumnReader::FloatColumnReader(mut column) = column else {
            bail!("column {name:?} holds no lists of f32");
        };
        let mut there = Vec::new();
        column.read_records(rows, Some(&mut there), Some(&mut begins), &mut values)?;
    }
    let width = values.len() / rows.max(1);
    // A row begins where the repetition level is 0.
    let regular = begins
        .iter()
        .enumerate()
        .all(|(i, level)| (*level == 0) == (i % width.max(1) == 0));
    ensure!(
        width > 0 && values.len() == rows * width && begins.len() == values.len() && regular,
        "lists of column {name:?} have different lengths"
    );
    Ok(Array2::from_shape_vec((rows, width), values)?)
}
