"""From COCO to LVIS v1: classes, data, losses and schedule of Detectron2's projects/ViTDet."""

from detectron2.config import LazyCall as L
from detectron2.data.detection_utils import get_fed_loss_cls_weights
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.evaluation import LVISEvaluator


def class_weights(dataset_names, power):
    """What the box predictor calls for the weights of the classes in its federated loss."""
    return lambda: get_fed_loss_cls_weights(dataset_names, power)


def use_lvis(dataloader, model, train, optimizer, lr_multiplier):
    """Turn a recipe for Mask R-CNN on COCO into that for LVIS v1, in place."""
    dataloader.train.dataset.names = "lvis_v1_train"
    dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
        repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
            dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.001
        )
    )
    dataloader.test.dataset.names = "lvis_v1_val"
    dataloader.evaluator._target_ = LVISEvaluator
    dataloader.evaluator.max_dets_per_image = 300

    model.roi_heads.num_classes = 1203
    model.roi_heads.box_predictor.update(
        test_score_thresh=0.02,
        test_topk_per_image=300,
        use_sigmoid_ce=True,
        use_fed_loss=True,
        get_fed_loss_cls_weights=L(class_weights)(
            dataset_names="${dataloader.train.dataset.names}", power=0.5
        ),
    )

    train.max_iter = 156250  # 100 epochs
    train.eval_period = 30000
    lr_multiplier.scheduler.milestones = [138889, 150463]
    lr_multiplier.warmup_length = 250 / train.max_iter
    optimizer.lr = 2e-4
