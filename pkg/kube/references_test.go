package kube_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/kube"
)

// connected is a client of an API that h serves.
func connected(t *testing.T, h http.HandlerFunc) *kube.Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	config := filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n", s.URL)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := kube.Connect(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestWhatNamesImages(t *testing.T) {
	pages := map[string]string{
		"/api/v1/persistentvolumes": `{"kind":"PersistentVolumeList","apiVersion":"v1","metadata":{"continue":"more"},"items":[
			{"metadata":{"name":"pvc-1"},"spec":{"csi":{"driver":"csi.quarry.dev","volumeHandle":"local/v1"}}},
			{"metadata":{"name":"host"},"spec":{"hostPath":{"path":"/x"}}}]}`,
		"/api/v1/persistentvolumes more": `{"kind":"PersistentVolumeList","apiVersion":"v1","items":[
			{"metadata":{"name":"other"},"spec":{"csi":{"driver":"other","volumeHandle":"x"}}},
			{"metadata":{"name":"pvc-2"},"spec":{"csi":{"driver":"csi.quarry.dev","volumeHandle":"local/v2"},"persistentVolumeReclaimPolicy":"Delete"},"status":{"phase":"Released"}},
			{"metadata":{"name":"pvc-3"},"spec":{"csi":{"driver":"csi.quarry.dev","volumeHandle":"local/v3"},"persistentVolumeReclaimPolicy":"Retain"},"status":{"phase":"Released"}}]}`,
		"/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents": `{"kind":"VolumeSnapshotContentList","apiVersion":"snapshot.storage.k8s.io/v1","metadata":{},"items":[
			{"metadata":{"name":"s1"},"spec":{"driver":"csi.quarry.dev","source":{"volumeHandle":"local/v1"}},"status":{"snapshotHandle":"local/s1"}},
			{"metadata":{"name":"s2","deletionTimestamp":"2026-01-02T03:04:05Z"},"spec":{"driver":"csi.quarry.dev","source":{"snapshotHandle":"local/s2"}}},
			{"metadata":{"name":"s3"},"spec":{"driver":"csi.quarry.dev","source":{"volumeHandle":"local/v1"}}},
			{"metadata":{"name":"s4"},"spec":{"driver":"other","source":{"snapshotHandle":"x"}}}]}`,
	}
	client := connected(t, func(w http.ResponseWriter, r *http.Request) {
		page, ok := pages[strings.TrimSpace(r.URL.Path+" "+r.URL.Query().Get("continue"))]
		w.Header().Set("Content-Type", "application/json")
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			page = `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404,"message":"not found"}`
		}
		fmt.Fprint(w, page)
	})
	got, err := client.References(t.Context(), "csi.quarry.dev")
	want := []kube.Reference{
		{Kind: "PersistentVolume", Name: "pvc-1", Handle: "local/v1"}, {Kind: "PersistentVolume", Name: "pvc-2", Handle: "local/v2", Going: true}, {Kind: "PersistentVolume", Name: "pvc-3", Handle: "local/v3"},
		{Kind: "VolumeSnapshotContent", Name: "s1", Handle: "local/s1", Snapshot: true}, {Kind: "VolumeSnapshotContent", Name: "s2", Handle: "local/s2", Snapshot: true, Going: true},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	delete(pages, "/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents")
	if got, err := client.References(t.Context(), "csi.quarry.dev"); err != nil || len(got) != 3 {
		t.Errorf("without the resources of snapshots: %+v, %v", got, err)
	}
	delete(pages, "/api/v1/persistentvolumes")
	_, err = client.References(t.Context(), "csi.quarry.dev")
	expect(t, err, fault.NotFound, "cannot list the PersistentVolumes")
}
