use std::{collections::BTreeMap, fs::File, io, sync::Arc};

use bytes::Bytes;
use proptest::{collection::vec, prelude::*, sample::select};

use super::{
    Aggregate, AggregateError, Aggregation, PayloadSource, Strategy as Rule, Update, Whose,
    blocks::BLOCK_ELEMENTS,
};
use crate::{
    SiloId,
    adapter::{AdapterLayout, AdapterVersion, TensorSpec, decode_f32, encode_f32},
    job::Weighting,
    seed::Seed,
};

/// A layout of `elements` elements in two tensors (one if there is only one element).
fn layout(elements: u64) -> AdapterLayout {
    let first = elements.div_ceil(2);
    let mut tensors = vec![TensorSpec::new("first", &[first])];
    if elements > first {
        tensors.push(TensorSpec::new("second", &[elements - first]));
    }
    AdapterLayout::new(tensors).unwrap()
}

fn values(elements: usize, seed: u64) -> Vec<f32> {
    let mut rng = Seed(seed).rng();
    (0..elements).map(|_| rng.normal() as f32).collect()
}

struct Case {
    layout: AdapterLayout,
    base: Vec<u8>,
    /// Name, examples, payload.
    silos: Vec<(String, u64, Vec<u8>)>,
}

impl Case {
    fn new(base: &[f32], silos: &[(&str, u64, &[f32])]) -> Self {
        Self {
            layout: layout(base.len() as u64),
            base: encode_f32(base),
            silos: silos
                .iter()
                .map(|(name, examples, delta)| ((*name).to_owned(), *examples, encode_f32(delta)))
                .collect(),
        }
    }

    /// Random numbers of the same size from every silo, with weights of their own.
    fn random(elements: usize, silos: u64) -> Self {
        Self {
            layout: layout(elements as u64),
            base: encode_f32(&values(elements, 999)),
            silos: (0..silos)
                .map(|k| {
                    (
                        format!("silo-{k:03}"),
                        3 + k * k,
                        encode_f32(&values(elements, k)),
                    )
                })
                .collect(),
        }
    }

    fn run(&self, weighting: Weighting) -> Result<(Vec<u8>, Aggregate), AggregateError> {
        let updates: BTreeMap<SiloId, Update<'_>> = self
            .silos
            .iter()
            .map(|(name, examples, delta)| {
                let update = Update {
                    examples: *examples,
                    delta,
                };
                (name.parse().unwrap(), update)
            })
            .collect();
        let work = Aggregation {
            layout: &self.layout,
            base: &self.base,
            updates,
        };
        let mut sink = Vec::new();
        let aggregate = Rule::WeightedMean(weighting)
            .aggregator()
            .aggregate(&work, &mut sink)?;
        Ok((sink, aggregate))
    }

    fn values(&self, weighting: Weighting) -> Vec<f32> {
        decode_f32(&self.run(weighting).unwrap().0).unwrap()
    }

    /// The sum in the plainest way, element by element.
    fn reference(&self, weighting: Weighting) -> Vec<f32> {
        let mut silos: Vec<_> = self.silos.iter().collect();
        silos.sort();
        let total: u64 = silos.iter().map(|(_, examples, _)| examples).sum();
        let deltas: Vec<_> = silos
            .iter()
            .map(|(_, _, delta)| decode_f32(delta).unwrap())
            .collect();
        let base = decode_f32(&self.base).unwrap();
        (0..base.len())
            .map(|i| {
                let mut step = 0.0_f64;
                for ((_, examples, _), delta) in silos.iter().zip(&deltas) {
                    let weight = match weighting {
                        Weighting::Examples => *examples as f64 / total as f64,
                        Weighting::Uniform => 1.0 / silos.len() as f64,
                    };
                    step += weight * f64::from(delta[i]);
                }
                (f64::from(base[i]) + step) as f32
            })
            .collect()
    }
}

fn with_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(work)
}

#[test]
fn examples_weigh_by_their_share() {
    let case = Case::new(
        &[10.0, 0.0],
        &[("a", 1, &[4.0, 1.0]), ("b", 3, &[8.0, 2.0])],
    );
    assert_eq!(case.values(Weighting::Examples), [17.0, 1.75]);
}

#[test]
fn uniform_weights_ignore_the_examples() {
    let case = Case::new(
        &[10.0, 0.0],
        &[("a", 1, &[4.0, 1.0]), ("b", 3, &[8.0, 2.0])],
    );
    assert_eq!(case.values(Weighting::Uniform), [16.0, 1.5]);
}

#[test]
fn every_silo_counts_exactly_once() {
    // Silo k sends 2^k: a loss or a double count changes the sum.
    let deltas: Vec<Vec<f32>> = (0..10).map(|k| vec![(1_u32 << k) as f32; 3]).collect();
    let names: Vec<String> = (0..10).map(|k| format!("s{k}")).collect();
    let silos: Vec<_> = names
        .iter()
        .zip(&deltas)
        .map(|(n, d)| (n.as_str(), 1, d.as_slice()))
        .collect();
    let case = Case::new(&[0.0; 3], &silos);
    assert_eq!(case.values(Weighting::Examples), [102.3_f32; 3]);
}

#[test]
fn a_single_contribution_is_added_whole() {
    let case = Case::new(&[1.0, 2.0, 3.0], &[("a", 7, &[0.5, -2.0, 0.25])]);
    for weighting in [Weighting::Examples, Weighting::Uniform] {
        assert_eq!(case.values(weighting), [1.5, 0.0, 3.25]);
    }
}

#[test]
fn the_version_and_the_norms_are_those_of_the_payloads() {
    let case = Case::new(
        &[1.0, 1.0],
        &[("a", 1, &[3.0, 4.0]), ("b", 1, &[-3.0, 4.0])],
    );
    let (payload, aggregate) = case.run(Weighting::Examples).unwrap();
    assert_eq!(aggregate.version, AdapterVersion::of(&payload));
    assert_eq!(aggregate.step_norm.to_bits(), 4.0_f64.to_bits());
    assert!(
        aggregate
            .update_norms
            .values()
            .all(|norm| norm.to_bits() == 5.0_f64.to_bits())
    );
    assert_eq!(aggregate.update_norms.len(), 2);
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let case = Case::random(BLOCK_ELEMENTS * 37 + 5, 3);
    let one = with_threads(1, || case.run(Weighting::Examples).unwrap());
    for threads in [2, 7] {
        let other = with_threads(threads, || case.run(Weighting::Examples).unwrap());
        assert!(one.0 == other.0, "{threads} threads gave other bytes");
        assert_eq!(one.1, other.1, "{threads} threads");
    }
    let outside = case.run(Weighting::Examples).unwrap();
    assert!(one == outside, "outside of any pool");
    assert!(decode_f32(&one.0).unwrap() == case.reference(Weighting::Examples));
}

#[test]
fn files_and_memory_give_the_same() {
    let case = Case::random(BLOCK_ELEMENTS + 3, 2);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        File::open(path).unwrap()
    };
    let base = file("base", &case.base);
    let deltas: Vec<_> = case
        .silos
        .iter()
        .map(|(name, _, delta)| file(name, delta))
        .collect();
    let updates = case
        .silos
        .iter()
        .zip(&deltas)
        .map(|((name, examples, _), delta)| {
            let update = Update {
                examples: *examples,
                delta,
            };
            (name.parse().unwrap(), update)
        })
        .collect();
    let work = Aggregation {
        layout: &case.layout,
        base: &base,
        updates,
    };
    let mut sink = Vec::new();
    Rule::WeightedMean(Weighting::Examples)
        .aggregator()
        .aggregate(&work, &mut sink)
        .unwrap();
    assert!(sink == case.run(Weighting::Examples).unwrap().0);
}

#[test]
fn a_value_that_is_not_finite_names_the_silo_and_the_tensor() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let case = Case::new(
            &[0.0; 4],
            &[("a", 1, &[1.0; 4]), ("b", 1, &[1.0, 1.0, bad, 1.0])],
        );
        match case.run(Weighting::Examples).unwrap_err() {
            AggregateError::NotFinite {
                whose,
                tensor,
                element,
            } => {
                assert_eq!(whose, Whose::Silo("b".parse().unwrap()));
                assert_eq!((tensor.as_str(), element), ("second", 2));
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn the_first_fault_in_payload_order_is_reported_at_any_number_of_threads() {
    let elements = BLOCK_ELEMENTS * 20;
    let mut delta = vec![0.0; elements];
    let first = BLOCK_ELEMENTS * 9 + 17;
    for index in [first, BLOCK_ELEMENTS * 10, elements - 1] {
        delta[index] = f32::NAN;
    }
    let case = Case::new(&vec![0.0; elements], &[("a", 1, &delta)]);
    for threads in [1, 2, 7] {
        match with_threads(threads, || case.run(Weighting::Uniform).unwrap_err()) {
            AggregateError::NotFinite { element, .. } => assert_eq!(element, first as u64),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn huge_values_average_without_overflow_in_between() {
    let case = Case::new(
        &[0.0],
        &[
            ("a", 1, &[f32::MAX]),
            ("b", 1, &[f32::MAX]),
            ("c", 1, &[-f32::MAX]),
        ],
    );
    assert_eq!(
        case.values(Weighting::Uniform),
        case.reference(Weighting::Uniform)
    );
    assert!(case.values(Weighting::Uniform)[0] > 1e38);
}

#[test]
fn a_result_beyond_f32_is_an_overflow_that_names_the_tensor() {
    let case = Case::new(&[0.0, f32::MAX], &[("a", 1, &[1.0, f32::MAX])]);
    let error = case.run(Weighting::Uniform).unwrap_err();
    assert!(
        matches!(&error, AggregateError::Overflow { tensor, element: 1 } if tensor == "second"),
        "{error}"
    );
}

#[test]
fn no_contribution_and_no_examples_are_errors() {
    let none = Case::new(&[0.0], &[]);
    assert!(matches!(
        none.run(Weighting::Uniform),
        Err(AggregateError::Empty)
    ));
    let weightless = Case::new(&[0.0], &[("a", 1, &[0.0]), ("b", 0, &[0.0])]);
    for weighting in [Weighting::Examples, Weighting::Uniform] {
        let error = weightless.run(weighting).unwrap_err();
        assert!(
            matches!(&error, AggregateError::NoExamples { silo } if silo.as_str() == "b"),
            "{error}"
        );
    }
}

#[test]
fn the_largest_numbers_of_examples_do_not_wrap() {
    let case = Case::new(&[0.0], &[("a", u64::MAX, &[2.0]), ("b", u64::MAX, &[4.0])]);
    assert_eq!(case.values(Weighting::Examples), [3.0]);
}

#[test]
fn a_payload_of_another_size_is_refused_before_anything_is_written() {
    let mut case = Case::new(&[0.0, 0.0], &[("a", 1, &[0.0, 0.0])]);
    case.silos[0].2.pop();
    let error = case.run(Weighting::Uniform).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the payload of silo `a` has 7 bytes, the layout 8"
    );
}

/// Says that it has the right size, and fails when it is read.
struct Torn;

impl PayloadSource for Torn {
    fn size(&self) -> io::Result<u64> {
        Ok(8)
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// A full disk.
struct Full;

impl io::Write for Full {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn faults_of_a_source_and_of_the_sink_are_told_apart() {
    let layout = layout(2);
    let zeros = vec![0_u8; 8];
    let aggregate = |delta: &dyn PayloadSource, sink: &mut dyn io::Write| {
        let work = Aggregation {
            layout: &layout,
            base: &zeros,
            updates: [("a".parse().unwrap(), Update { examples: 1, delta })].into(),
        };
        Rule::WeightedMean(Weighting::Uniform)
            .aggregator()
            .aggregate(&work, sink)
            .unwrap_err()
    };
    assert!(matches!(
        aggregate(&Torn, &mut Vec::new()),
        AggregateError::Read {
            whose: Whose::Silo(_),
            offset: 0,
            ..
        }
    ));
    assert!(matches!(
        aggregate(&zeros, &mut Full),
        AggregateError::Write(_)
    ));
}

#[test]
fn reading_beyond_the_end_of_bytes_is_an_error() {
    let bytes = Arc::new(Bytes::from_static(&[1, 2, 3]));
    let mut buffer = [0; 2];
    bytes.read_at(1, &mut buffer).unwrap();
    assert_eq!(buffer, [2, 3]);
    for offset in [2, 4, u64::MAX] {
        assert!(bytes.read_at(offset, &mut buffer).is_err(), "{offset}");
    }
}

fn any_value() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -10.0_f32..10.0,
        1 => select(&[0.0, -0.0, f32::MIN_POSITIVE, 1e-45, 3e37, -3e37][..]),
    ]
}

fn any_case() -> impl Strategy<Value = Case> {
    // A few sizes around the borders of blocks, and small ones.
    let sizes = prop_oneof![
        6 => 1_usize..40,
        1 => BLOCK_ELEMENTS - 1..BLOCK_ELEMENTS + 2,
    ];
    (sizes, 1_usize..6).prop_flat_map(|(elements, silos)| {
        let pattern = || vec(any_value(), elements.min(40));
        let silo = (1_u64..1_000_000, pattern());
        (Just(elements), pattern(), vec(silo, silos)).prop_map(|(elements, base, silos)| {
            let fill = |pattern: &[f32]| -> Vec<u8> {
                encode_f32(
                    &pattern
                        .iter()
                        .copied()
                        .cycle()
                        .take(elements)
                        .collect::<Vec<_>>(),
                )
            };
            Case {
                layout: layout(elements as u64),
                base: fill(&base),
                silos: silos
                    .iter()
                    .enumerate()
                    .map(|(k, (examples, delta))| (format!("s{k}"), *examples, fill(delta)))
                    .collect(),
            }
        })
    })
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let examples: Vec<_> = self.silos.iter().map(|(_, examples, _)| examples).collect();
        write!(
            f,
            "{} elements, examples {examples:?}",
            self.layout.elements()
        )
    }
}

proptest! {
    #[test]
    fn the_result_is_the_plain_sum_whatever_the_order_of_arrival(
        (case, arrival) in any_case().prop_flat_map(|case| {
            let order: Vec<usize> = (0..case.silos.len()).collect();
            (Just(Arc::new(case)), Just(order).prop_shuffle())
        }),
        uniform in any::<bool>(),
    ) {
        let weighting = if uniform { Weighting::Uniform } else { Weighting::Examples };
        let (payload, aggregate) = case.run(weighting).unwrap();
        let expected = encode_f32(&case.reference(weighting));
        prop_assert!(payload == expected, "differs from the plain sum");
        let shuffled = Case {
            layout: case.layout.clone(),
            base: case.base.clone(),
            silos: arrival.iter().map(|&k| case.silos[k].clone()).collect(),
        };
        let (other, same) = shuffled.run(weighting).unwrap();
        prop_assert!(other == payload, "the order of arrival shows");
        prop_assert_eq!(same, aggregate);
    }
}
