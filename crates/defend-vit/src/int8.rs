//! Weight matrices as eight-bit integers with a scale for each output channel.
//!
//! A row `w` is kept as `q = round(w / s)` in -127..=127 with `s = max |w| / 127`. The scale is rounded to `bf16`: its eight bits
//! times the seven of `q` fit a `f32`, so `q s` is exact, and rounding what was read gives the same integers and scales again.

use std::collections::HashMap;

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::Error;

/// Largest magnitude of an integer: -128 stays unused.
const LARGEST: f32 = 127.0;

/// What a matrix's name is followed by in the name of its scales.
const SCALES: &str = ".scale";

/// Content of a tensor in a safetensors file: name, type, shape and bytes.
pub(crate) type Buffer = (String, Dtype, Vec<usize>, Vec<u8>);

/// A weight matrix in eight bits.
pub(crate) struct Int8Matrix {
    /// `[O, ...]`, as the tensor that it came from.
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<i8>,
    /// One for each of the `O` output channels.
    pub(crate) scales: Vec<bf16>,
}

impl Int8Matrix {
    /// Rounds a tensor `[O, ...]` of rank two or more.
    pub(crate) fn round(tensor: &Tensor) -> candle_core::Result<Self> {
        let rows = tensor.flatten_from(1)?.to_dtype(DType::F32)?;
        let rows = rows.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        let mut values = Vec::with_capacity(tensor.elem_count());
        let mut scales = Vec::with_capacity(rows.len());
        for row in rows {
            let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
            let scale = bf16::from_f32(largest / LARGEST);
            let per_step = match scale.to_f32() {
                0.0 => 0.0,
                scale => 1.0 / scale,
            };
            let integer = |v: f32| (v * per_step).round().clamp(-LARGEST, LARGEST) as i8;
            values.extend(row.into_iter().map(integer));
            scales.push(scale);
        }
        Ok(Self {
            shape: tensor.dims().to_vec(),
            values,
            scales,
        })
    }

    /// The values that the integers stand for, `[O, ...]` in `f32`.
    fn dequantize(self) -> candle_core::Result<Tensor> {
        let row = self.values.len() / self.scales.len().max(1);
        let mut values = Vec::with_capacity(self.values.len());
        for (row, scale) in self.values.chunks(row.max(1)).zip(&self.scales) {
            values.extend(row.iter().map(|&q| f32::from(q) * scale.to_f32()));
        }
        Tensor::from_vec(values, self.shape, &Device::Cpu)
    }

    /// The integers, and their scales.
    pub(crate) fn into_buffers(self, name: String) -> [Buffer; 2] {
        let scales = self.scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let values = self.values.iter().map(|q| q.to_ne_bytes()[0]).collect();
        let (scales_name, rows) = (format!("{name}{SCALES}"), vec![self.scales.len()]);
        [
            (name, Dtype::I8, self.shape, values),
            (scales_name, Dtype::BF16, rows, scales),
        ]
    }
}

/// A tensor as it is, in `f32`.
pub(crate) fn float_buffer(name: String, tensor: &Tensor) -> candle_core::Result<Buffer> {
    let values = tensor.flatten_all()?.to_dtype(DType::F32)?;
    let values = values.to_vec1::<f32>()?.into_iter();
    let bytes = values.flat_map(f32::to_le_bytes).collect();
    Ok((name, Dtype::F32, tensor.dims().to_vec(), bytes))
}

/// A tensor rounded to `f16`.
pub(crate) fn half_buffer(name: String, tensor: &Tensor) -> candle_core::Result<Buffer> {
    let values = tensor.flatten_all()?.to_dtype(DType::F16)?;
    let values = values.to_vec1::<f16>()?.into_iter();
    let bytes = values.flat_map(f16::to_le_bytes).collect();
    Ok((name, Dtype::F16, tensor.dims().to_vec(), bytes))
}

/// Every tensor of a file in `f32`; matrices in eight bits as the values that they stand for.
///
/// # Errors
/// [`Error::Damaged`] when a matrix in eight bits has no scale for each of its output channels.
pub(crate) fn read_tensors(
    file: &SafeTensors<'_>,
    origin: &str,
) -> Result<HashMap<String, Tensor>, Error> {
    let views = file.tensors();
    let is_scales = |name: &str| {
        let matrix = name.strip_suffix(SCALES);
        matrix.is_some_and(|m| file.tensor(m).is_ok_and(|m| m.dtype() == Dtype::I8))
    };
    let mut tensors = HashMap::with_capacity(views.len());
    for (name, view) in &views {
        if is_scales(name) {
            continue;
        }
        let tensor = match view.dtype() {
            Dtype::I8 => {
                let scales = file.tensor(&format!("{name}{SCALES}")).ok();
                matrix(view, scales.as_ref())
                    .ok_or_else(|| Error::Damaged {
                        origin: origin.to_owned(),
                        reason: format!(
                            "tensor {name} is in eight bits: expected a matrix, and {name}{SCALES} with a bf16 number for each of its rows"
                        ),
                    })?
                    .dequantize()?
            }
            _ => view.load(&Device::Cpu)?.to_dtype(DType::F32)?,
        };
        tensors.insert(name.clone(), tensor);
    }
    Ok(tensors)
}

fn matrix(values: &TensorView<'_>, scales: Option<&TensorView<'_>>) -> Option<Int8Matrix> {
    let scales = scales.filter(|s| s.dtype() == Dtype::BF16)?;
    let shape = values.shape().to_vec();
    if shape.len() < 2 || scales.shape() != &shape[..1] {
        return None;
    }
    let scale = |bytes: &[u8]| Some(bf16::from_le_bytes(bytes.try_into().ok()?));
    Some(Int8Matrix {
        shape,
        values: values
            .data()
            .iter()
            .map(|b| i8::from_ne_bytes([*b]))
            .collect(),
        scales: scales
            .data()
            .chunks_exact(2)
            .map(scale)
            .collect::<Option<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use defend_nn::Rng;
    use proptest::prelude::*;

    #[test]
    fn a_matrix_in_eight_bits_is_known_to_the_last_bit() {
        // Scales: 12.7 / 127 = 0.1, which bf16 has as 0.10009765625; nothing; 254 / 127 = 2.
        let tensor = Tensor::new(
            &[[12.7f32, -12.7, 0.05], [0.0, 0.0, 0.0], [254.0, 1.0, -3.1]],
            &Device::Cpu,
        )
        .unwrap();
        let matrix = Int8Matrix::round(&tensor).unwrap();
        assert_eq!(matrix.values, [127, -127, 0, 0, 0, 0, 127, 1, -2]);
        let scales: Vec<f32> = matrix.scales.iter().map(|s| s.to_f32()).collect();
        assert_eq!(scales, [0.100_097_656, 0.0, 2.0]);
        let read = matrix.dequantize().unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(read[0], [12.712_402, -12.712_402, 0.0]);
        assert_eq!(read[2], [254.0, 2.0, -4.0]);
    }

    proptest! {
        #[test]
        fn rounding_twice_changes_nothing_and_no_value_moves_more_than_half_a_step(
            seed in any::<u64>(), exponent in -30i32..30, rows in 1usize..5, columns in 1usize..40
        ) {
            let scale = 2f32.powi(exponent);
            let values: Vec<f32> = defend_nn::normal((rows, columns), f64::from(scale), &mut Rng::seed(seed), &Device::Cpu)
                .unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let tensor = Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap();
            let first = Int8Matrix::round(&tensor).unwrap();
            let (integers, scales) = (first.values.clone(), first.scales.clone());
            let read = first.dequantize().unwrap();
            let second = Int8Matrix::round(&read).unwrap();
            prop_assert_eq!(&second.values, &integers);
            prop_assert_eq!(&second.scales, &scales);
            let (before, after) = (tensor.to_vec2::<f32>().unwrap(), read.to_vec2::<f32>().unwrap());
            for ((before, after), scale) in before.iter().zip(&after).zip(&scales) {
                // The largest value may lie half a bf16 step of the scale beyond 127 scales.
                let bound = scale.to_f32() * (0.5 + 1e-3);
                for (b, a) in before.iter().zip(after) {
                    prop_assert!((b - a).abs() <= bound, "{} {} {}", b, a, bound);
                }
            }
        }
    }
}
