package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/utils/ptr"
)

// empty is a driver that answers at once and does nothing: what a storm of claims takes on it is the
// floor of the machinery, which no driver can go below.
type empty struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
}

const emptyDriver = "empty.e2e.quarry.dev"

func (empty) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: emptyDriver, VendorVersion: "0"}, nil
}

func (empty) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{{Type: &csi.PluginCapability_Service_{
		Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}}}}}, nil
}

func (empty) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

func (empty) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: []*csi.ControllerServiceCapability{{Type: &csi.ControllerServiceCapability_Rpc{
		Rpc: &csi.ControllerServiceCapability_RPC{Type: csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME}}}}}, nil
}

func (empty) CreateVolume(_ context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{VolumeId: r.GetName(), CapacityBytes: r.GetCapacityRange().GetRequiredBytes()}}, nil
}

func (empty) DeleteVolume(context.Context, *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return &csi.DeleteVolumeResponse{}, nil
}

// serveEmpty runs the empty driver with a provisioner of its own, as Quarry's has it, and makes a class for it.
func (r *rig) serveEmpty() (class string) {
	r.Helper()
	provisioner := os.Getenv("QUARRY_PROVISIONER")
	if provisioner == "" {
		r.Fatal("$QUARRY_PROVISIONER must name the program csi-provisioner")
	}
	socket := filepath.Join(must(os.MkdirTemp("", "e2e"))(r), "csi.sock")
	l := must(net.Listen("unix", socket))(r)
	s := grpc.NewServer()
	csi.RegisterIdentityServer(s, empty{})
	csi.RegisterControllerServer(s, empty{})
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	log := must(os.Create(socket + ".log"))(r)
	cmd := exec.Command(provisioner, "--csi-address="+socket, "--kubeconfig="+os.Getenv("KUBECONFIG"), "--timeout=60s",
		"--retry-interval-max=30s", "--extra-create-metadata", "--kube-api-qps=100", "--kube-api-burst=200")
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	r.must(cmd.Start())
	name := "empty-" + r.ns
	_, err := r.kube.StorageV1().StorageClasses().Create(bg, &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name},
		Provisioner: emptyDriver, VolumeBindingMode: ptr.To(storagev1.VolumeBindingImmediate)}, metav1.CreateOptions{})
	r.must(err)
	r.Cleanup(func() {
		r.must(r.kube.StorageV1().StorageClasses().Delete(bg, name, metav1.DeleteOptions{}))
		if err := cmd.Process.Signal(syscall.SIGTERM); err == nil {
			_ = cmd.Wait() // it says so when it is told to end
		}
		s.Stop()
		r.must(<-served)
		r.must(log.Close())
		r.must(os.RemoveAll(filepath.Dir(socket)))
	})
	return name
}

// TestAStormOfClaims: many claims at once on Quarry, and on a driver that does nothing, one after the other. It says how
// many were bound in a minute, and how long one took; $QUARRY_STORM says how many there are.
func TestAStormOfClaims(t *testing.T) {
	many := 20
	if s := os.Getenv("QUARRY_STORM"); s != "" {
		var err error
		if many, err = strconv.Atoi(s); err != nil || many < 1 {
			t.Fatalf("$QUARRY_STORM %q must be a number of claims", s)
		}
	}
	r := newRig(t)
	floor := r.serveEmpty()
	rates := map[string]float64{}
	for round, class := range []string{classShared, floor, floor, classShared} {
		took, all := r.storm(fmt.Sprintf("storm%d", round), class, many)
		slices.Sort(took)
		rate := float64(many) / all.Minutes()
		rates[class] += rate / 2
		r.Logf("%-12.12s %d claims: %.0f a minute, p50 %s, p99 %s", class, many, rate,
			took[many/2].Round(time.Millisecond), took[min(many-1, many*99/100)].Round(time.Millisecond))
	}
	r.Logf("Quarry binds %.2f times as many claims as the floor", rates[classShared]/rates[floor])
}

// storm makes claims, waits until all are bound, and deletes them. It says how long each took from its
// creation until it was seen to be bound, and all together.
func (r *rig) storm(prefix, class string, many int) (took []time.Duration, all time.Duration) {
	r.Helper()
	claims := r.kube.CoreV1().PersistentVolumeClaims(r.ns)
	ctx, cancel := context.WithTimeout(bg, 4*patience)
	defer cancel()
	seen := must(claims.Watch(ctx, metav1.ListOptions{FieldSelector: fields.Everything().String()}))(r)
	defer seen.Stop()
	var mu sync.Mutex
	created := map[string]time.Time{}
	began := time.Now()
	names := make(chan string, many)
	for i := range many {
		names <- fmt.Sprintf("%s-%d", prefix, i)
	}
	close(names)
	var makers sync.WaitGroup
	errs := make(chan error, many)
	for range 8 {
		makers.Go(func() {
			for name := range names {
				mu.Lock()
				created[name] = time.Now()
				mu.Unlock()
				_, err := claims.Create(ctx, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name},
					Spec: claim{class: class, size: "16Mi"}.spec()}, metav1.CreateOptions{})
				if err != nil {
					errs <- err
				}
			}
		})
	}
	bound := map[string]bool{}
	for len(bound) < many {
		select {
		case err := <-errs:
			r.Fatal(err)
		case e, ok := <-seen.ResultChan():
			if !ok {
				r.Fatalf("the watch ended with %d of %d claims bound", len(bound), many)
			}
			c, isClaim := e.Object.(*corev1.PersistentVolumeClaim)
			if !isClaim || e.Type == watch.Deleted || c.Status.Phase != corev1.ClaimBound || bound[c.Name] {
				continue
			}
			mu.Lock()
			at, mine := created[c.Name]
			mu.Unlock()
			if mine {
				bound[c.Name] = true
				took = append(took, time.Since(at))
			}
		}
	}
	all = time.Since(began)
	makers.Wait()
	r.must(claims.DeleteCollection(bg, metav1.DeleteOptions{}, metav1.ListOptions{}))
	r.wait("the claims and their volumes to go", func() (bool, error) {
		left, err := r.volumesLeft()
		return err == nil && len(left) == 0, fmt.Errorf("%d volumes are left: %w", len(left), orNever(err))
	})
	return took, all
}
