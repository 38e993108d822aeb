package lvm

import (
	"bytes"
	"context"
	"errors"
	"strings"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host/lvm"
)

// CreateTag implements engine.Engine. One lvcreate makes the volume and its LVM
// tags, or nothing.
func (e *lvmEngine) CreateTag(ctx context.Context, tag engine.Tag) error {
	if err := engine.CheckTag(tag); err != nil {
		return err
	}
	lv := volume(tagSort, tag.Name)
	err := e.group.CreateRecord(ctx, lv, encodeTag(tag)...)
	if !errors.Is(err, fault.Exists) {
		return err
	}
	volumes, err := e.list(ctx, lvm.Names([]string{marker, lv}, nil), false)
	if err != nil {
		return err
	}
	for _, v := range volumes {
		if v.Name != lv {
			continue
		}
		have, ok := decodeTag(v)
		switch {
		case !ok || have.Name != tag.Name || have.Record == nil:
			return fault.New(fault.Exists, "tag %q is taken by something that cannot be read as a tag: logical volume %s/%s", tag.Name, e.name, lv)
		case have.Slab != tag.Slab || !bytes.Equal(have.Record, tag.Record):
			return fault.New(fault.Exists, "tag %q is taken by another record", tag.Name)
		}
		return nil // a lost reply
	}
	return fault.New(fault.Exists, "tag %q was taken, and was deleted meanwhile", tag.Name)
}

// DeleteTag implements engine.Engine.
func (e *lvmEngine) DeleteTag(ctx context.Context, name string) error {
	if err := engine.CheckName("tag name", name); err != nil {
		return err
	}
	err := e.group.RemoveRecord(ctx, volume(tagSort, name))
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	return err
}

// ListTags implements engine.Engine: one report, made under the group's lock.
func (e *lvmEngine) ListTags(ctx context.Context, prefix string) ([]engine.Tag, error) {
	if strings.Trim(prefix, "abcdefghijklmnopqrstuvwxyz0123456789._-") != "" {
		return nil, nil // nothing begins like that
	}
	volumes, err := e.list(ctx, selection(prefix), false)
	if err != nil {
		return nil, err
	}
	tags := make([]engine.Tag, 0, len(volumes))
	for _, v := range volumes {
		if tag, ok := decodeTag(v); ok && v.Name != marker && strings.HasPrefix(tag.Name, prefix) {
			tags = append(tags, tag)
		}
	}
	return tags, nil
}
