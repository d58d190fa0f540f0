//! Quantiles of the normal distribution and of samples.

use crate::Error;

/// Refuses a confidence level outside `0 < confidence < 1`.
pub(crate) fn check_confidence(confidence: f64) -> Result<(), Error> {
    if confidence > 0.0 && confidence < 1.0 {
        return Ok(());
    }
    Err(Error::Config {
        field: "confidence",
        value: confidence,
        expected: "0 < confidence < 1",
    })
}

/// Refuses fewer resamples than an interval of this confidence needs: a bound would be an extreme value.
pub(crate) fn check_resamples(resamples: usize, confidence: f64) -> Result<(), Error> {
    check_confidence(confidence)?;
    // 2 / (1 - 0.95) is 39.999...: compare with a little slack.
    if resamples as f64 >= 2.0 / (1.0 - confidence) - 1e-6 {
        return Ok(());
    }
    Err(Error::Config {
        field: "resamples",
        value: resamples as f64,
        expected: "at least 2 / (1 - confidence)",
    })
}

/// Quantile of the standard normal distribution for `0 < p < 1`, relative error below 1.2e-9.
///
/// Acklam's rational approximation ("An algorithm for computing the inverse normal cumulative
/// distribution function", 2003).
pub(crate) fn standard_normal(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969_683_028_665_376e1,
        2.209_460_984_245_205e2,
        -2.759_285_104_469_687e2,
        1.383_577_518_672_69e2,
        -3.066_479_806_614_716e1,
        2.506_628_277_459_239,
    ];
    const B: [f64; 6] = [
        -5.447_609_879_822_406e1,
        1.615_858_368_580_409e2,
        -1.556_989_798_598_866e2,
        6.680_131_188_771_972e1,
        -1.328_068_155_288_572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784_894_002_430_293e-3,
        -3.223_964_580_411_365e-1,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 5] = [
        7.784_695_709_041_462e-3,
        3.224_671_290_700_398e-1,
        2.445_134_137_142_996,
        3.754_408_661_907_416,
        1.0,
    ];
    const TAIL: f64 = 0.024_25;

    let horner = |c: &[f64], x: f64| c.iter().fold(0.0, |sum, c| sum * x + c);
    if p < TAIL {
        let q = (-2.0 * p.ln()).sqrt();
        horner(&C, q) / horner(&D, q)
    } else if p > 1.0 - TAIL {
        -standard_normal(1.0 - p)
    } else {
        let q = p - 0.5;
        let r = q * q;
        horner(&A, r) * q / horner(&B, r)
    }
}

/// Quantile of ascending values, linear between neighbours as NumPy's default.
pub(crate) fn of_sorted(values: &[f64], p: f64) -> f64 {
    let position = p * (values.len() - 1) as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(values.len() - 1);
    values[below] + (position - below as f64) * (values[above] - values[below])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_quantiles() {
        // scipy.stats.norm.ppf
        let table = [
            (0.975, 1.959_963_984_540_054),
            (0.5, 0.0),
            (0.025, -1.959_963_984_540_054),
            (0.995, 2.575_829_303_548_9),
            (0.8, 0.841_621_233_572_914),
            (1e-6, -4.753_424_308_822_899),
        ];
        for (p, z) in table {
            assert!(
                (standard_normal(p) - z).abs() < 1e-8,
                "{p}: {}",
                standard_normal(p)
            );
        }
    }

    #[test]
    fn sample_quantiles() {
        let values = [1.0, 2.0, 4.0];
        for (p, q) in [(0.0, 1.0), (0.5, 2.0), (0.75, 3.0), (1.0, 4.0)] {
            assert!((of_sorted(&values, p) - q).abs() < 1e-12);
        }
    }
}
