package kube

import (
	"context"
	"encoding/json"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// pageSize is how many objects one answer may have.
const pageSize = 500

// contentsPath is where VolumeSnapshotContents are: a resource that Kubernetes itself does not have.
const contentsPath = "/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents"

// Reference is an object that names a volume or snapshot of a driver.
type Reference struct {
	Kind   string // "PersistentVolume" or "VolumeSnapshotContent"
	Name   string
	Handle string
	// Snapshot: the handle is a snapshot's.
	Snapshot bool
	// Going: it is deleted, and goes when its volume or snapshot has gone.
	Going bool
}

// References lists the PersistentVolumes and VolumeSnapshotContents of a driver. A cluster
// without the resources of snapshots has none.
func (c *Client) References(ctx context.Context, driver string) ([]Reference, error) {
	out, err := c.volumes(ctx, driver)
	if err != nil {
		return nil, failed(err, "cannot list the PersistentVolumes")
	}
	contents, err := c.contents(ctx, driver)
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, failed(err, "cannot list the VolumeSnapshotContents")
	}
	return append(out, contents...), nil
}

func (c *Client) volumes(ctx context.Context, driver string) ([]Reference, error) {
	var out []Reference
	for next := ""; ; {
		list, err := c.api.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{Limit: pageSize, Continue: next})
		if err != nil {
			return nil, err
		}
		for _, v := range list.Items {
			if v.Spec.CSI == nil || v.Spec.CSI.Driver != driver {
				continue
			}
			going := v.Status.Phase == corev1.VolumeReleased && v.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete
			out = append(out, Reference{Kind: "PersistentVolume", Name: v.Name, Handle: v.Spec.CSI.VolumeHandle, Going: going || v.DeletionTimestamp != nil})
		}
		if next = list.Continue; next == "" {
			return out, nil
		}
	}
}

// content is as much of a VolumeSnapshotContent as counts here.
type content struct {
	Metadata metav1.ObjectMeta
	Spec     struct {
		Driver string
		Source struct{ SnapshotHandle string }
	}
	Status struct{ SnapshotHandle string }
}

func (c *Client) contents(ctx context.Context, driver string) ([]Reference, error) {
	var out []Reference
	for next := ""; ; {
		var list struct {
			Metadata metav1.ListMeta
			Items    []content
		}
		r := c.api.CoreV1().RESTClient().Get().AbsPath(contentsPath).SetHeader("Accept", "application/json").Param("limit", "500").Param("continue", next).Do(ctx)
		if err := r.Error(); err != nil {
			return nil, err
		}
		data, err := r.Raw()
		if err == nil {
			err = json.Unmarshal(data, &list)
		}
		if err != nil {
			return nil, err
		}
		for _, v := range list.Items {
			handle := v.Status.SnapshotHandle
			if handle == "" {
				handle = v.Spec.Source.SnapshotHandle
			}
			if v.Spec.Driver == driver && handle != "" {
				out = append(out, Reference{Kind: "VolumeSnapshotContent", Name: v.Metadata.Name, Handle: handle, Snapshot: true, Going: v.Metadata.DeletionTimestamp != nil})
			}
		}
		if next = list.Metadata.Continue; next == "" {
			return out, nil
		}
	}
}
