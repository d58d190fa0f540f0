//! The assigning network as a moving average of the trained one (Leopart; BYOL's target network).

use candle_core::{Result, Tensor, Var};

/// Averages of the parameters that train, exchanged with them for the assigning pass.
pub(crate) struct MovingAverage {
    momentum: f64,
    averages: Vec<(Var, Tensor)>,
}

impl MovingAverage {
    /// Starts at the parameters' present values. `momentum`: share that an average keeps of itself.
    pub(crate) fn new(momentum: f64, parameters: Vec<(String, Var)>) -> Result<Self> {
        let averages = parameters
            .into_iter()
            .map(|(_, var)| Ok((var.clone(), var.as_detached_tensor().copy()?)))
            .collect::<Result<_>>()?;
        Ok(Self { momentum, averages })
    }

    /// Runs `pass` with the averages in place of the parameters. What `pass` changes of them stays with the averages.
    pub(crate) fn during<R, E: From<candle_core::Error>>(
        &mut self,
        pass: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<R, E> {
        self.exchange()?;
        let result = pass();
        self.exchange()?;
        result
    }

    fn exchange(&mut self) -> Result<()> {
        for (var, average) in &mut self.averages {
            let value = var.as_detached_tensor().copy()?;
            var.set(average)?;
            *average = value;
        }
        Ok(())
    }

    /// Moves the averages towards the parameters after a step.
    pub(crate) fn update(&mut self) -> Result<()> {
        for (var, average) in &mut self.averages {
            let value = var.as_detached_tensor();
            *average = ((&*average * self.momentum)? + (value * (1.0 - self.momentum))?)?;
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
