//! A network as a moving average of the one that trains (BYOL's target network, Leopart's assigning one).

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, Var, bail};

/// Averages of the parameters that train, exchanged with them for a pass of the average network.
#[derive(Debug)]
pub struct MovingAverage {
    momentum: f64,
    averages: Vec<(String, Var, Tensor)>,
}

impl MovingAverage {
    /// Starts at the present values of the named parameters. `momentum`: share that an average keeps of itself.
    ///
    /// # Errors
    /// Those of candle.
    pub fn new(momentum: f64, parameters: Vec<(String, Var)>) -> Result<Self> {
        let averages = parameters
            .into_iter()
            .map(|(name, var)| {
                let value = var.as_detached_tensor().copy()?;
                Ok((name, var, value))
            })
            .collect::<Result<_>>()?;
        Ok(Self { momentum, averages })
    }

    /// Runs `pass` with the averages in place of the parameters. What `pass` changes of them stays with the averages.
    ///
    /// # Errors
    /// Those of `pass` and of candle.
    pub fn during<R, E: From<candle_core::Error>>(
        &mut self,
        pass: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        self.exchange()?;
        let result = pass();
        self.exchange()?;
        result
    }

    fn exchange(&mut self) -> Result<()> {
        for (_, var, average) in &mut self.averages {
            let value = var.as_detached_tensor().copy()?;
            var.set(average)?;
            *average = value;
        }
        Ok(())
    }

    /// Moves the averages towards the parameters after a step.
    ///
    /// # Errors
    /// Those of candle.
    pub fn update(&mut self) -> Result<()> {
        for (_, var, average) in &mut self.averages {
            let value = var.as_detached_tensor();
            *average = ((&*average * self.momentum)? + (value * (1.0 - self.momentum))?)?;
        }
        Ok(())
    }

    /// The averages, under the names of their parameters: what a checkpoint keeps.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let each = |(name, _, average): &(String, Var, Tensor)| (name.clone(), average.clone());
        self.averages.iter().map(each).collect()
    }

    /// Takes the averages of [`MovingAverage::state`] out of `state`.
    ///
    /// # Errors
    /// When one is missing or has another shape.
    pub fn restore(&mut self, state: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, var, average) in &mut self.averages {
            match state.remove(name) {
                Some(value) if value.shape() == var.shape() => {
                    *average = value.to_device(var.device())?.to_dtype(var.dtype())?;
                }
                Some(value) => bail!(
                    "the average of \"{name}\" has shape {:?}, expected {:?}",
                    value.shape(),
                    var.shape()
                ),
                None => bail!("the average of \"{name}\" is missing"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn averages_follow_slowly_and_the_parameters_come_back() -> Result<()> {
        let var = Var::new(&[1.0f32, 2.0], &Device::Cpu)?;
        let mut average = MovingAverage::new(0.75, vec![("x".into(), var.clone())])?;
        var.set(&Tensor::new(&[5.0f32, 2.0], &Device::Cpu)?)?;
        average.update()?;
        let seen = average.during(|| var.to_vec1::<f32>())?;
        assert_eq!(seen, [2.0, 2.0]);
        assert_eq!(var.to_vec1::<f32>()?, [5.0, 2.0]);
        let failed: Result<()> = average.during(|| candle_core::bail!("a failed pass"));
        assert!(failed.is_err());
        assert_eq!(var.to_vec1::<f32>()?, [5.0, 2.0]);
        Ok(())
    }
}
