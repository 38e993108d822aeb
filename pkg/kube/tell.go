package kube

import (
	"context"
	"encoding/json"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
)

const (
	// tellBacklog is how many events may wait; what is more is not told.
	tellBacklog = 256
	// tellBurst and tellRate are how often one object is told of something: 25 times, then
	// once in 20 s. client-go's own rate, once in 5 minutes, is less than a long copy has to say.
	tellBurst = 25
	tellRate  = 1.0 / 20
)

// snapshotsPath is where VolumeSnapshots are, by namespace.
const snapshotsPath = "/apis/snapshot.storage.k8s.io/v1/namespaces/"

// Subject is the volume or snapshot that somebody is to hear of, by what the sidecars say of it.
type Subject struct {
	Name     string // the CSI name, which is that of the PersistentVolume
	Snapshot bool
	// Namespace and Claim of the PersistentVolumeClaim or VolumeSnapshot, and the name of the
	// PersistentVolume; each may be unknown.
	Namespace, Claim, Volume string
}

// message waits to be told.
type message struct {
	subject      Subject
	object       *corev1.ObjectReference // instead of subject
	kind         string
	reason, text string
}

// Teller writes Events on PersistentVolumeClaims and VolumeSnapshots. Of one object there is one Event for
// each reason: what is told again replaces its message and is counted.
type Teller struct {
	client *Client
	queue  chan message
}

// NewTeller makes a Teller, which tells while it runs.
func NewTeller(client *Client) *Teller {
	return &Teller{client: client, queue: make(chan message, tellBacklog)}
}

// Tell tells whoever uses a volume or snapshot. It never waits, and what cannot be told is lost.
func (t *Teller) Tell(s Subject, warning bool, reason, text string) {
	m := message{subject: s, kind: corev1.EventTypeNormal, reason: reason, text: text}
	if warning {
		m.kind = corev1.EventTypeWarning
	}
	t.put(m)
}

// TellPod warns whoever looks at a pod: our own, by what its environment says of it.
func (t *Teller) TellPod(namespace, name, uid, reason, text string) {
	if name == "" {
		return
	}
	t.put(message{object: &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: namespace, Name: name, UID: types.UID(uid)},
		kind: corev1.EventTypeWarning, reason: reason, text: text})
}

func (t *Teller) put(m message) {
	select {
	case t.queue <- m:
	default:
	}
}

// Run tells until ctx ends.
func (t *Teller) Run(ctx context.Context) {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx), record.WithCorrelatorOptions(record.CorrelatorOptions{
		BurstSize: tellBurst, QPS: tellRate,
		// One event for each reason, whatever its message.
		MaxEvents: 1, MessageFunc: func(e *corev1.Event) string { return e.Message },
	}))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&corev1client.EventSinkImpl{Interface: t.client.api.CoreV1().Events("")})
	recorder := broadcaster.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: "quarry"})
	log := klog.FromContext(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case m := <-t.queue:
			object, err := m.object, error(nil)
			if object == nil {
				object, err = t.client.object(ctx, m.subject)
			}
			if err != nil && ctx.Err() == nil {
				log.Error(failed(err, "cannot find the claim or snapshot of %q", m.subject.Name), "An event is not told", "reason", m.reason, "message", m.text)
			}
			if object != nil {
				recorder.Event(object, m.kind, m.reason, m.text)
			}
		}
	}
}

// object that an event is written on, with its UID, without which kubectl does not show the event; nil: there is none.
func (c *Client) object(ctx context.Context, s Subject) (*corev1.ObjectReference, error) {
	if s.Snapshot {
		return c.snapshot(ctx, s)
	}
	name := s.Volume
	if name == "" {
		name = s.Name
	}
	v, err := c.api.CoreV1().PersistentVolumes().Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		if ref := v.Spec.ClaimRef; ref != nil && ref.UID != "" {
			return &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: ref.Namespace, Name: ref.Name, UID: ref.UID}, nil
		}
		return nil, nil // not bound
	}
	if !apierrors.IsNotFound(err) || s.Namespace == "" || s.Claim == "" {
		return nil, absent(err)
	}
	claim, err := c.api.CoreV1().PersistentVolumeClaims(s.Namespace).Get(ctx, s.Claim, metav1.GetOptions{})
	if err != nil {
		return nil, absent(err)
	}
	if !same("pvc-", s.Name, string(claim.UID)) || claim.Spec.VolumeName != "" && claim.Spec.VolumeName != name {
		return nil, nil // another one of that name
	}
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID}, nil
}

func (c *Client) snapshot(ctx context.Context, s Subject) (*corev1.ObjectReference, error) {
	if s.Namespace == "" || s.Claim == "" {
		return nil, nil
	}
	r := c.api.CoreV1().RESTClient().Get().AbsPath(snapshotsPath+s.Namespace+"/volumesnapshots/"+s.Claim).SetHeader("Accept", "application/json").Do(ctx)
	if err := r.Error(); err != nil {
		return nil, absent(err)
	}
	data, err := r.Raw()
	var found struct{ Metadata metav1.ObjectMeta }
	if err == nil {
		err = json.Unmarshal(data, &found)
	}
	if err != nil || !same("snapshot-", s.Name, string(found.Metadata.UID)) {
		return nil, err
	}
	return &corev1.ObjectReference{APIVersion: "snapshot.storage.k8s.io/v1", Kind: "VolumeSnapshot", Namespace: s.Namespace, Name: s.Claim, UID: found.Metadata.UID}, nil
}

// same says whether a CSI name that a sidecar made of a UID is of that UID.
func same(prefix, name, uid string) bool {
	of, made := strings.CutPrefix(name, prefix)
	return !made || of == uid
}

// absent is nil for an object that is not there: nobody is to be told then.
func absent(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
