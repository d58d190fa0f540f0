//! Records that stand in one table, and the names of the files about them.

use crate::Record;
use crate::record::file_name;

/// The records of one protocol on one data set.
pub(crate) struct Group<'a> {
    pub(crate) data: &'a str,
    pub(crate) protocol: &'a str,
    /// Names, in the configuration's order.
    pub(crate) experiments: Vec<&'a str>,
    pub(crate) methods: Vec<&'a str>,
    pub(crate) seeds: Vec<u64>,
    pub(crate) records: Vec<&'a Record>,
}

pub(crate) fn plot_name(group: &Group<'_>, experiment: &str) -> String {
    let parts = [group.data, group.protocol, experiment].map(file_name);
    parts.join("-")
}

pub(crate) fn histogram_name(record: &Record) -> String {
    run_name(record) + "-scores.svg"
}

pub(crate) fn run_name(record: &Record) -> String {
    let key = &record.key;
    let parts =
        [&key.data, &key.protocol, &key.experiment, &key.method].map(|part| file_name(part));
    format!("{}-seed{}", parts.join("-"), key.seed)
}

/// The groups, in the order of their first records.
pub(crate) fn groups(records: &[Record]) -> Vec<Group<'_>> {
    fn add<T: PartialEq>(list: &mut Vec<T>, item: T) {
        if !list.contains(&item) {
            list.push(item);
        }
    }
    let mut groups: Vec<Group<'_>> = Vec::new();
    for record in records {
        let key = &record.key;
        let known = groups
            .iter()
            .position(|g| g.data == key.data && g.protocol == key.protocol);
        let place = known.unwrap_or(groups.len());
        if known.is_none() {
            groups.push(Group {
                data: &key.data,
                protocol: &key.protocol,
                experiments: Vec::new(),
                methods: Vec::new(),
                seeds: Vec::new(),
                records: Vec::new(),
            });
        }
        let Some(group) = groups.get_mut(place) else {
            continue;
        };
        add(&mut group.experiments, key.experiment.as_str());
        add(&mut group.seeds, key.seed);
        group.records.push(record);
    }
    for group in &mut groups {
        for record in &group.records {
            add(&mut group.methods, record.key.method.as_str());
        }
    }
    groups
}
