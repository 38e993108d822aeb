package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/quarry-csi/quarry/pkg/kube"
)

// empty is a driver that answers at once and does nothing; its volumes are empty directories. What a storm of claims
// and pods takes on it is the floor of the machinery, which no driver can go below.
type empty struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer
	node string
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
	out := &csi.ControllerGetCapabilitiesResponse{}
	for _, c := range []csi.ControllerServiceCapability_RPC_Type{csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME} {
		out.Capabilities = append(out.Capabilities, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{
			Rpc: &csi.ControllerServiceCapability_RPC{Type: c}}})
	}
	return out, nil
}

func (empty) CreateVolume(_ context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{VolumeId: r.GetName(), CapacityBytes: r.GetCapacityRange().GetRequiredBytes()}}, nil
}

func (empty) DeleteVolume(context.Context, *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return &csi.DeleteVolumeResponse{}, nil
}

func (empty) ControllerPublishVolume(context.Context, *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	return &csi.ControllerPublishVolumeResponse{}, nil
}

func (empty) ControllerUnpublishVolume(context.Context, *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}

func (e empty) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: e.node}, nil
}

func (empty) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	return &csi.NodeGetCapabilitiesResponse{}, nil
}

func (empty) NodePublishVolume(_ context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	return &csi.NodePublishVolumeResponse{}, os.MkdirAll(r.GetTargetPath(), 0o750)
}

func (empty) NodeUnpublishVolume(_ context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	err := os.Remove(r.GetTargetPath())
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return &csi.NodeUnpublishVolumeResponse{}, err
}

// emptyNode serves the driver to the kubelet of the node on which this process runs, until its standard input ends.
func emptyNode(node string) error {
	socket := "/var/lib/kubelet/plugins/" + emptyDriver + "/csi.sock"
	// A run that was broken off may have left its socket.
	if err := errors.Join(os.RemoveAll(filepath.Dir(socket)), os.MkdirAll(filepath.Dir(socket), 0o750)); err != nil {
		return err
	}
	s, served, err := serve(socket, empty{node: node})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(bg)
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // whatever ends it
		cancel()
	}()
	err = kube.Register(ctx, kube.RegistrationConfig{DriverName: emptyDriver, Endpoint: socket}, nil)
	s.Stop()
	return errors.Join(err, <-served, os.RemoveAll(filepath.Dir(socket)))
}

func serve(socket string, e empty) (*grpc.Server, <-chan error, error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	s := grpc.NewServer()
	csi.RegisterIdentityServer(s, e)
	csi.RegisterControllerServer(s, e)
	csi.RegisterNodeServer(s, e)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	return s, served, nil
}

// serveEmpty runs the empty driver on this machine, with sidecars of its own that have the arguments of Quarry's, and on
// every node, and makes a class for it.
func (r *rig) serveEmpty() (class string) {
	r.Helper()
	dir := must(os.MkdirTemp("", "e2e"))(r)
	socket := filepath.Join(dir, "csi.sock")
	s, served, err := serve(socket, empty{})
	r.must(err)
	r.Cleanup(func() {
		s.Stop()
		r.must(<-served)
		r.must(os.RemoveAll(dir))
	})
	_, err = r.kube.StorageV1().CSIDrivers().Create(bg, &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: emptyDriver}}, metav1.CreateOptions{})
	r.must(err)
	r.Cleanup(func() { r.must(r.kube.StorageV1().CSIDrivers().Delete(bg, emptyDriver, metav1.DeleteOptions{})) })
	for _, sidecar := range []string{"csi-provisioner", "csi-attacher"} {
		r.runSidecar(sidecar, socket)
	}
	for _, node := range r.nodes {
		r.runEmptyNode(node)
	}
	name := "empty-" + r.ns
	_, err = r.kube.StorageV1().StorageClasses().Create(bg, &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name},
		Provisioner: emptyDriver, VolumeBindingMode: ptr.To(storagev1.VolumeBindingImmediate)}, metav1.CreateOptions{})
	r.must(err)
	r.Cleanup(func() { r.must(r.kube.StorageV1().StorageClasses().Delete(bg, name, metav1.DeleteOptions{})) })
	return name
}

func (r *rig) runSidecar(name, socket string) {
	r.Helper()
	program := strings.TrimSpace(must(r.program(r.command, "path", name))(r))
	controller := must(r.kube.AppsV1().Deployments(system).Get(bg, release+"-controller", metav1.GetOptions{}))(r)
	args := []string{"--csi-address=" + socket, "--kubeconfig=" + os.Getenv("KUBECONFIG")}
	for _, c := range controller.Spec.Template.Spec.Containers {
		if c.Name != name {
			continue
		}
		for _, a := range c.Args {
			if !strings.HasPrefix(a, "--csi-address=") && !strings.Contains(a, "-capacity") { // of which it knows nothing
				args = append(args, a)
			}
		}
	}
	if len(args) < 4 {
		r.Fatalf("the controller has no %s: %q", name, args)
	}
	log := must(os.Create(filepath.Join(filepath.Dir(socket), name+".log")))(r)
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	r.must(cmd.Start())
	r.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err == nil {
			_ = cmd.Wait() // it says so when it is told to end
		}
		r.must(log.Close())
	})
}

// runEmptyNode runs this program on a node, as emptyNode.
func (r *rig) runEmptyNode(node string) {
	r.Helper()
	me := must(os.Open(must(os.Executable())(r)))(r)
	defer me.Close()
	size := must(me.Stat())(r).Size()
	cmd := exec.Command(r.command, "exec", node, "sh", "-ec", fmt.Sprintf(
		"head -c %d >/run/e2e.empty; chmod 700 /run/e2e.empty; QUARRY_EMPTY_NODE=%s exec /run/e2e.empty", size, node))
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	stdin := must(cmd.StdinPipe())(r)
	r.must(cmd.Start())
	r.Cleanup(func() {
		r.must(stdin.Close())
		r.must(cmd.Wait())
	})
	must(io.Copy(stdin, me))(r)
	r.wait("the empty driver on "+node, func() (bool, error) {
		n, err := r.kube.StorageV1().CSINodes().Get(bg, node, metav1.GetOptions{})
		return err == nil && slices.ContainsFunc(n.Spec.Drivers, func(d storagev1.CSINodeDriver) bool { return d.Name == emptyDriver }), err
	})
}
