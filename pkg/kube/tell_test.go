package kube_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/quarry-csi/quarry/pkg/kube"
)

// told is an API server with objects, which keeps the Events that it is given.
type told struct {
	mu      sync.Mutex
	objects map[string]string // by path
	events  map[string]corev1.Event
	patched int
}

func (s *told) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	data, _ := io.ReadAll(r.Body)
	w.Header().Set("Content-Type", "application/json")
	switch {
	case r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/events"):
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode(data, nil, nil)
		if err != nil {
			panic(err)
		}
		e := object.(*corev1.Event)
		s.events[e.Name] = *e
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(e)
	case r.Method == http.MethodPatch:
		name := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		e := s.events[name]
		if err := json.Unmarshal(data, &e); err != nil {
			panic(err)
		}
		s.events[name] = e
		s.patched++
		_ = json.NewEncoder(w).Encode(e)
	case s.objects[r.URL.Path] != "":
		_, _ = io.WriteString(w, s.objects[r.URL.Path])
	default:
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404,"message":"not found"}`)
	}
}

func (s *told) find(reason string) []corev1.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []corev1.Event
	for _, e := range s.events {
		if e.Reason == reason {
			out = append(out, e)
		}
	}
	return out
}

func TestEventsAreWrittenOnClaimsAndSnapshots(t *testing.T) {
	const claims, snapshots = "/api/v1/namespaces/shop/persistentvolumeclaims/", "/apis/snapshot.storage.k8s.io/v1/namespaces/shop/volumesnapshots/"
	claim := func(name, uid, volume string) string {
		return `{"kind":"PersistentVolumeClaim","apiVersion":"v1","metadata":{"namespace":"shop","name":"` + name + `","uid":"` + uid + `"},"spec":{"volumeName":"` + volume + `"}}`
	}
	s := &told{events: map[string]corev1.Event{}, objects: map[string]string{
		"/api/v1/persistentvolumes/pvc-u1":    `{"kind":"PersistentVolume","apiVersion":"v1","metadata":{"name":"pvc-u1"},"spec":{"claimRef":{"namespace":"shop","name":"data","uid":"u1"}}}`,
		"/api/v1/persistentvolumes/available": `{"kind":"PersistentVolume","apiVersion":"v1","metadata":{"name":"available"}}`,
		claims + "new":                        claim("new", "u2", ""),
		claims + "again":                      claim("again", "u9", ""),
		claims + "moved":                      claim("moved", "u4", "another"),
		snapshots + "snap":                    `{"kind":"VolumeSnapshot","apiVersion":"snapshot.storage.k8s.io/v1","metadata":{"namespace":"shop","name":"snap","uid":"u5"}}`,
	}}
	client := connected(t, s.ServeHTTP)
	teller := kube.NewTeller(client)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { teller.Run(ctx); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	for reason, about := range map[string]kube.Subject{
		"Bound":    {Name: "pvc-u1", Namespace: "shop", Claim: "stale"},
		"New":      {Name: "pvc-u2", Namespace: "shop", Claim: "new"},
		"Snapshot": {Name: "snapshot-u5", Snapshot: true, Namespace: "shop", Claim: "snap"},
		// Nobody is told of these.
		"Unbound": {Name: "x", Volume: "available"}, "Again": {Name: "pvc-u3", Namespace: "shop", Claim: "again"}, "Moved": {Name: "v", Namespace: "shop", Claim: "moved"},
		"Gone": {Name: "pvc-u6", Namespace: "shop", Claim: "gone"}, "Unknown": {Name: "v"}, "OtherSnapshot": {Name: "snapshot-u6", Snapshot: true, Namespace: "shop", Claim: "snap"},
	} {
		teller.Tell(about, reason == "New", reason, "because")
	}
	for _, far := range []string{"20%", "43%", "60%"} {
		teller.Tell(kube.Subject{Name: "pvc-u1"}, false, "Copying", "copying "+far)
	}
	until(t, "the last event", func() bool {
		e := s.find("Copying")
		return len(e) == 1 && e[0].Message == "copying 60%" && e[0].Count == 3
	})
	for reason, want := range map[string]struct{ kind, name, uid, weight string }{
		"Bound": {"PersistentVolumeClaim", "data", "u1", "Normal"}, "New": {"PersistentVolumeClaim", "new", "u2", "Warning"}, "Snapshot": {"VolumeSnapshot", "snap", "u5", "Normal"},
	} {
		until(t, reason, func() bool { return len(s.find(reason)) > 0 })
		e := s.find(reason)[0]
		o := e.InvolvedObject
		if o.Kind != want.kind || o.Name != want.name || string(o.UID) != want.uid || o.Namespace != "shop" || e.Namespace != "shop" || e.Type != want.weight || e.Message != "because" || e.Source.Component != "quarry" {
			t.Errorf("%s: %+v", reason, e)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.events) != 4 || s.patched != 2 {
		t.Errorf("%d events, patched %d times: %+v", len(s.events), s.patched, s.events)
	}
}
