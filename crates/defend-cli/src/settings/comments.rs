//! A line on each setting, for the file that `defend settings` prints.

/// What a setting is; `None` for a key that there is not.
pub(super) fn comment(key: &str) -> Option<&'static str> {
    let found = COMMENTS.iter().find(|(known, _)| *known == key);
    found.map(|(_, comment)| *comment)
}

const COMMENTS: [(&str, &str); 104] = [
    ("seed", "Seed of every random choice: same seed, same bits."),
    (
        "resize_mode",
        "How images become square: \"squash\" keeps all of them, or the form below cuts the sides off.",
    ),
    (
        "resize_mode.center-crop.crop_pct",
        "Share of the shorter side that is kept.",
    ),
    (
        "image_size",
        "Side that images are resized to, pixels; a multiple of the patch size. Not set: what the backbone was trained at.",
    ),
    (
        "reduced_decoding",
        "Whether large JPEGs are decoded at a part of their size, at least twice the size that they are resized to: about 60 % of the time.",
    ),
    (
        "false_alarm_rate",
        "Share of normal images that the threshold of a fit calls novel, about. `defend calibrate` gives a promise.",
    ),
    (
        "batch_size",
        "Images of a forward pass when scoring; changes no score.",
    ),
    (
        "compute_precision",
        "How the frozen backbone computes: \"f32\" or \"bf16\".",
    ),
    (
        "dense",
        "Dense fine-tuning of the backbone (paper, section 3.1); not set: it stays as it was pretrained.",
    ),
    ("dense.epochs", "Passes over the images."),
    ("dense.batch_size", "Images a step."),
    (
        "dense.view",
        "What a crop is compared with: the \"whole\" image, or one of the forms below.",
    ),
    ("dense.view.random.count", "Large views of each image."),
    (
        "dense.view.random.area",
        "Share of the image that each shows, from and to.",
    ),
    ("dense.crops", "Small crops of each image."),
    (
        "dense.gradient_clip",
        "Largest norm of all gradients of a step together; larger ones are scaled down to it.",
    ),
    ("dense.crop_size", "Side of a small crop, pixels."),
    (
        "dense.crop_area",
        "Share of the image that a small crop shows, from and to.",
    ),
    ("dense.crop_aspect", "Ratio of its sides, from and to."),
    (
        "dense.head_hidden",
        "Widths of the projection head's hidden layers.",
    ),
    ("dense.head_output", "Width that the head projects to."),
    (
        "dense.prototypes",
        "Prototypes that patches are assigned to.",
    ),
    (
        "dense.sinkhorn.epsilon",
        "Entropy of the optimal transport (eq. 1): the smaller, the harder the assignment.",
    ),
    ("dense.sinkhorn.iterations", "Rounds of Sinkhorn-Knopp."),
    (
        "dense.assignment",
        "Assignments as they are (\"soft\") or the nearest prototype alone (\"hard\").",
    ),
    (
        "dense.resampling",
        "How assignments are brought to a crop's grid: by \"area\", or the form below.",
    ),
    (
        "dense.resampling.roi-align.side",
        "Places along each side that both are sampled at.",
    ),
    (
        "dense.queue",
        "Patches of earlier batches that take part in the assignment.",
    ),
    (
        "dense.target_momentum",
        "Momentum of a teacher by moving average; not set: the network is its own.",
    ),
    (
        "dense.temperature",
        "Temperature of the prototypes' softmax (eq. 2).",
    ),
    (
        "dense.trained_blocks",
        "Last blocks of the backbone that are trained.",
    ),
    (
        "dense.backbone_learning_rate",
        "Learning rate of the backbone.",
    ),
    (
        "dense.head_learning_rate",
        "Learning rate of head and prototypes.",
    ),
    ("dense.weight_decay", "Decoupled weight decay."),
    (
        "dense.final_weight_decay",
        "Weight decay at the end, by a half cosine; not set: it stays the same.",
    ),
    (
        "dense.cache_bytes",
        "Memory for tokens that do not change while it trains, bytes.",
    ),
    (
        "student.closed-form.group_share",
        "Images within this share of the median squared distance are near copies and count once.",
    ),
    (
        "student.closed-form.posterior.first_part",
        "Weight of the last block's CLS token beside the others.",
    ),
    (
        "student.closed-form.posterior.width",
        "Width of the kernel, in units of the distance to the nearest groups.",
    ),
    (
        "student.closed-form.posterior.ridge",
        "Noise of the Gaussian process.",
    ),
    (
        "student.closed-form.posterior.exact_images",
        "Up to so many images the process is exact; beyond, each image is judged by its neighbours.",
    ),
    (
        "student.closed-form.posterior.neighbours",
        "How many of these.",
    ),
    (
        "student.closed-form.contrast.enabled",
        "Whether images are compared with ordinary photos too.",
    ),
    (
        "student.closed-form.contrast.parts",
        "CLS tokens that the contrast looks at, the last first.",
    ),
    ("student.closed-form.contrast.width", "Width of its kernel."),
    ("student.closed-form.contrast.ridge", "Its noise."),
    (
        "student.closed-form.contrast.dropped",
        "Share of the ordinary photos, those most like the normal images, that is left out.",
    ),
    (
        "student.closed-form.contrast.full_share",
        "Share of ordinary photos that look normal from which on the contrast counts wholly.",
    ),
    (
        "student.closed-form.contrast.weight",
        "Its weight where it counts wholly.",
    ),
    (
        "student.closed-form.patches.core",
        "Patches that are remembered, chosen by k-centre.",
    ),
    (
        "student.closed-form.patches.random",
        "Further ones, chosen at random.",
    ),
    (
        "student.closed-form.patches.candidates",
        "Patches that they are chosen from.",
    ),
    (
        "student.closed-form.patches.projected",
        "Random projection that the choice is made in, channels.",
    ),
    (
        "student.closed-form.patches.images",
        "Images whose patches are looked at.",
    ),
    (
        "student.closed-form.patches.worst",
        "Patches of an image that make its value, the worst ones.",
    ),
    (
        "student.closed-form.patches.fault_ridge",
        "Ridge of the direction that known faults lie in.",
    ),
    (
        "student.closed-form.patches.alike_from",
        "How alike normal images have to be for patches to count.",
    ),
    (
        "student.closed-form.patches.alike_over",
        "From there to full weight.",
    ),
    (
        "student.closed-form.patches.weight",
        "Full weight of the patches.",
    ),
    (
        "student.closed-form.objects.images",
        "Normal images and photos whose places the maps are made of.",
    ),
    (
        "student.closed-form.objects.places",
        "Places of each kind that are remembered.",
    ),
    (
        "student.closed-form.objects.width",
        "Width of the density over places.",
    ),
    (
        "student.closed-form.known.width",
        "Width of the kernel around known abnormal images.",
    ),
    ("student.closed-form.known.ridge", "Its noise."),
    (
        "student.closed-form.known.margin",
        "What an image has to have of them before it counts.",
    ),
    (
        "student.closed-form.known.hesitation",
        "How slowly a few of them count.",
    ),
    (
        "student.closed-form.together.width",
        "Scoring a folder together: width of the kernel between its images.",
    ),
    ("student.closed-form.together.ridge", "Its noise."),
    (
        "student.closed-form.together.least",
        "Least share of abnormal images that is looked for.",
    ),
    (
        "student.closed-form.together.images",
        "Images that are compared with each other.",
    ),
    (
        "student.closed-form.together.noise",
        "Standard deviations above chance before they count.",
    ),
    (
        "student.closed-form.together.full_share",
        "Share of abnormal images from which on they count wholly.",
    ),
    (
        "student.masked.distill.epochs",
        "Passes over the images (paper: 10).",
    ),
    (
        "student.masked.distill.min_steps",
        "Least number of steps: small sets get more passes.",
    ),
    ("student.masked.distill.batch_size", "Images a step."),
    (
        "student.masked.distill.mask",
        "\"none\", or one of the forms below.",
    ),
    (
        "student.masked.distill.mask.keep-salient.ratio",
        "Share of the patches that the student does not see (paper: half).",
    ),
    (
        "student.masked.distill.mask.keep-salient.selection",
        "\"sampled\" by CLS attention, or the \"top-k\".",
    ),
    (
        "student.masked.distill.mask.hide-salient.ratio",
        "Share of the patches that the student does not see, the salient ones.",
    ),
    (
        "student.masked.distill.mask.hide-salient.selection",
        "\"sampled\" by CLS attention, or the \"top-k\".",
    ),
    (
        "student.masked.distill.mask.random.ratio",
        "Share of the patches that the student does not see.",
    ),
    (
        "student.masked.distill.layers",
        "Layers that are compared, counted from the last (Table 1a).",
    ),
    (
        "student.masked.distill.distance.norm",
        "How features are normalised: \"l2\" (eq. 3), \"layer\" or \"none\".",
    ),
    (
        "student.masked.distill.distance.side",
        "Which side is: \"both\" or the \"teacher\".",
    ),
    (
        "student.masked.distill.distance.penalty",
        "\"squared\" (eq. 4) or \"smooth-l1\".",
    ),
    (
        "student.masked.distill.cls_weight",
        "Weight of the CLS token in the loss (paper: 0).",
    ),
    (
        "student.masked.distill.learning_rate",
        "Peak learning rate.",
    ),
    (
        "student.masked.distill.schedule",
        "\"constant\", or one of the forms below.",
    ),
    (
        "student.masked.distill.schedule.cosine.warmup",
        "Share of the steps in which the rate rises.",
    ),
    (
        "student.masked.distill.schedule.cosine.floor",
        "Share of the peak that it ends with.",
    ),
    (
        "student.masked.distill.weight_decay",
        "Decoupled weight decay.",
    ),
    ("student.masked.distill.betas", "AdamW's betas."),
    (
        "student.masked.distill.gradient_clip",
        "Largest norm of all gradients of a step together; larger ones are scaled down to it.",
    ),
    (
        "student.masked.distill.drop_path",
        "Stochastic depth of the student's last block.",
    ),
    (
        "student.masked.distill.cache_bytes",
        "Memory for the teacher's features, bytes.",
    ),
    (
        "student.masked.aggregation",
        "How patch distances become a score: \"mean\" (section 3.3), or one of the forms below.",
    ),
    (
        "student.masked.aggregation.best-patches.share",
        "Share of the patches, those that are predicted best.",
    ),
    (
        "student.masked.aggregation.worst-patches.share",
        "Share of the patches, those that are predicted worst.",
    ),
    (
        "student.masked.aggregation.patches-and-cls.weight",
        "Weight of the CLS token beside the mean of the patches.",
    ),
    ("tiles", "Large images in tiles; see defend fit --tiles."),
    ("tiles.columns", "Tiles across."),
    ("tiles.rows", "Tiles down."),
    (
        "tiles.overlap",
        "Share of a tile that its neighbour shows too.",
    ),
    (
        "tiles.memory",
        "Which tiles of the normal images a tile is compared with: \"shared\" or \"per-position\".",
    ),
];
