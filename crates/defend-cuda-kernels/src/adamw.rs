//! AdamW for all parameters of a group and type in one launch.

use candle_core::{DType, Result, Tensor};

use super::launch::{Grid, Number, address_of, launch};
use defend_kernels::adamw::AdamWStep;

/// Values that a block of threads handles.
const VALUES_PER_PART: usize = 16 * 1024;

/// A parameter, its moments `[2, ...]` and its gradient, all contiguous and of one type on one device.
pub struct Slot<'a> {
    /// Changed in place.
    pub parameter: &'a Tensor,
    /// First and second, `[2, ...]`, changed in place.
    pub moments: &'a Tensor,
    /// Of the parameter's shape.
    pub gradient: Tensor,
}

/// The addresses of some parameters and how they are cut into parts, on the device.
struct Table {
    slots: Tensor,
    parts: Tensor,
    count: usize,
    dtype: DType,
}

impl Table {
    fn new(slots: &[Slot<'_>]) -> Result<Self> {
        let (mut words, mut parts) = (Vec::new(), Vec::new());
        for (i, slot) in slots.iter().enumerate() {
            let count = slot.gradient.elem_count();
            let addresses = [slot.parameter, slot.moments, &slot.gradient];
            for address in addresses {
                words.extend(halves(address_of(address)?));
            }
            words.extend(halves(count as u64));
            let starts = (0..count).step_by(VALUES_PER_PART);
            parts.extend(starts.flat_map(|start| [i as u32, start as u32]));
        }
        let device = slots[0].parameter.device();
        Ok(Self {
            slots: Tensor::from_slice(&words, words.len(), device)?,
            count: parts.len() / 2,
            parts: Tensor::from_slice(&parts, parts.len(), device)?,
            dtype: slots[0].parameter.dtype(),
        })
    }

    fn launch(&self, name: &str, more: Option<&Tensor>, numbers: &[Number]) -> Result<()> {
        let grid = Grid {
            blocks: [self.count, 1],
            threads: [256, 1],
        };
        let mut tensors = vec![Some(&self.slots), Some(&self.parts)];
        tensors.extend(more.map(Some));
        let name = format!("{name}_{}", self.dtype.as_str());
        launch(&name, grid, &tensors, numbers)
    }
}

/// As the processor keeps an `u64` in memory.
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// Index of the first gradient with a value that is not finite. Waits for the device.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn first_not_finite(slots: &[Slot<'_>]) -> Result<Option<usize>> {
    let Some(first) = slots.first() else {
        return Ok(None);
    };
    let found = Tensor::zeros(slots.len(), DType::U32, first.parameter.device())?;
    let numbers = [VALUES_PER_PART.into()];
    Table::new(slots)?.launch("not_finite", Some(&found), &numbers)?;
    let found: Vec<u32> = found.to_vec1()?;
    Ok(found.into_iter().position(|wrong| wrong != 0))
}

/// Updates parameters and moments in place.
///
/// # Errors
/// Those of candle and of the CUDA driver.
pub fn step(slots: &[Slot<'_>], update: &AdamWStep) -> Result<()> {
    if slots.is_empty() {
        return Ok(());
    }
    let numbers = [
        VALUES_PER_PART.into(),
        update.beta1.into(),
        (1.0 - update.beta1).into(),
        update.beta2.into(),
        (1.0 - update.beta2).into(),
        update.keep.into(),
        update.step_size.into(),
        update.second_correction.into(),
        update.eps.into(),
    ];
    Table::new(slots)?.launch("adamw", None, &numbers)
}
