use super::*;

fn confusion(classes: usize, truth: &[i64], predicted: &[i64]) -> Confusion {
    Confusion::count(classes, truth, predicted).unwrap()
}

fn close(got: f64, want: f64) {
    assert!((got - want).abs() < 1e-12, "{got} is not {want}");
}

#[test]
fn three_classes_agree_with_scikit_learn() {
    // sklearn.metrics on these lists: accuracy 0.6, macro F1 0.5888..., MCC 0.4042...
    let truth = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2];
    let predicted = [0, 0, 1, 1, 1, 2, 2, 2, 0, 1];
    let counts = confusion(3, &truth, &predicted);
    assert_eq!(counts.at(2, 0), 1);
    close(counts.accuracy(), 0.6);
    // F1: 2*2/(3+3), 2*2/(3+4), 2*2/(4+3).
    close(counts.macro_f1(), (4.0 / 6.0 + 4.0 / 7.0 + 4.0 / 7.0) / 3.0);
    // c = 6, s = 10, sum p t = 3*3 + 3*4 + 4*3 = 33, sum p^2 = 34, sum t^2 = 34.
    close(
        counts.mcc(),
        (60.0 - 33.0) / ((100.0 - 34.0_f64) * (100.0 - 34.0)).sqrt(),
    );
}

#[test]
fn the_binary_coefficient_is_the_textbook_one() {
    // tp 6, tn 3, fp 1, fn 2.
    let truth = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0];
    let predicted = [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0];
    let (tp, tn, fp, negatives) = (6.0, 3.0, 1.0, 2.0_f64);
    let want = (tp * tn - fp * negatives)
        / ((tp + fp) * (tp + negatives) * (tn + fp) * (tn + negatives)).sqrt();
    close(confusion(2, &truth, &predicted).mcc(), want);
}

#[test]
fn a_class_that_never_occurs_does_not_lower_the_macro_mean() {
    close(confusion(3, &[0, 1], &[0, 1]).macro_f1(), 1.0);
}

#[test]
fn one_class_only_has_no_correlation() {
    close(confusion(2, &[1, 1, 1], &[1, 1, 1]).mcc(), 0.0);
    close(confusion(2, &[0, 1, 1], &[1, 1, 1]).mcc(), 0.0);
}

#[test]
fn nothing_counts_as_zero() {
    let empty = confusion(2, &[], &[]);
    close(empty.accuracy(), 0.0);
    close(empty.macro_f1(), 0.0);
    close(empty.mcc(), 0.0);
}

#[test]
fn indices_outside_the_classes_are_refused() {
    assert!(Confusion::count(2, &[0], &[2]).is_err());
    assert!(Confusion::count(2, &[-1], &[0]).is_err());
    assert!(Confusion::count(2, &[0, 1], &[0]).is_err());
}

#[test]
fn ties_share_the_mean_of_their_ranks() {
    assert_eq!(ranks(&[10.0, 20.0, 20.0, 5.0]), [2.0, 3.5, 3.5, 1.0]);
}

#[test]
fn rank_correlation_agrees_with_scipy() {
    // scipy.stats.spearmanr([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) = 0.8207826816681233
    close(
        spearman(&[1.0, 2.0, 3.0, 4.0, 5.0], &[5.0, 6.0, 7.0, 8.0, 7.0]),
        0.820_782_681_668_123_3,
    );
    close(spearman(&[1.0, 2.0, 3.0], &[0.1, 0.01, -5.0]), -1.0);
    close(spearman(&[1.0, 1.0, 1.0], &[1.0, 2.0, 3.0]), 0.0);
}

#[test]
fn a_metric_of_the_other_kind_of_task_is_refused() {
    let classes = Problem::Classification {
        classes: vec!["a".to_owned()],
    };
    assert_eq!(metric_key(MetricName::Auto, &classes).unwrap(), "accuracy");
    assert_eq!(
        metric_key(MetricName::Auto, &Problem::Regression).unwrap(),
        "spearman"
    );
    assert!(metric_key(MetricName::Spearman, &classes).is_err());
    assert!(metric_key(MetricName::Mcc, &Problem::Regression).is_err());
}
