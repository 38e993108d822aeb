package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/quarry-csi/quarry/test/lab"
)

// ourAddress is this machine's address for others.
const ourAddress = "198.18.199.1"

// machine is as much of another machine as one kernel can be: a network, mounts and a host name of its own, and with
// them NFS clients that share nothing with others. Loop and device-mapper devices are the kernel's, and so everybody's.
type machine struct {
	t    *testing.T
	name string
	pid  int // of a process in it
}

// newMachine makes the n-th machine, until the test ends. The folder private is empty in it, and nobody else's.
func newMachine(t *testing.T, n int, private string) *machine {
	t.Helper()
	m := &machine{t: t, name: fmt.Sprint("n", n)}
	link, net := "quarry-n"+strconv.Itoa(n), fmt.Sprintf("198.18.%d.", 200+n)
	t.Cleanup(func() { // the cable goes with the machine; before that, its clients would miss it when they end
		for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
			if _, err := os.Stat("/sys/class/net/" + link); errors.Is(err, os.ErrNotExist) {
				return
			} else if time.Now().After(end) {
				t.Fatalf("the machine %s does not go away: %v", m.name, err)
			}
		}
	})
	m.pid = m.begin("unshare", "--net", "--mount", "--uts", "--propagation", "private", "sleep", "infinity")
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", m.pid)); err == nil && string(comm) == "sleep\n" {
			break
		} else if time.Now().After(end) {
			t.Fatalf("the namespaces of %s: %v", m.name, err)
		}
	}
	outside(t, "ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", strconv.Itoa(m.pid))
	outside(t, "ip", "addr", "add", net+"1/24", "dev", link)
	outside(t, "ip", "link", "set", link, "up")
	m.run("ip", "link", "set", "lo", "up")
	m.run("ip", "addr", "add", net+"2/24", "dev", "eth0")
	m.run("ip", "link", "set", "eth0", "up")
	m.run("ip", "route", "add", "default", "via", net+"1")
	m.run("hostname", m.name) // by which an NFS 4 server knows its clients
	m.run("mount", "-t", "tmpfs", "none", "/run")
	m.run("mount", "-t", "tmpfs", "none", private)
	// The lock manager of NFS 3, which a directory volume has, announces itself there.
	m.run("mkdir", "-p", "/run/rpcbind")
	m.begin(append(m.enter(), "rpcbind", "-f")...)
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(m.see("/run/rpcbind.sock")); err == nil {
			return m
		} else if time.Now().After(end) {
			t.Fatalf("rpcbind of %s: %v", m.name, err)
		}
	}
}

// outside runs a program on this machine.
func outside(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
}

// enter are the words before a program that runs on the machine.
func (m *machine) enter() []string {
	return []string{"nsenter", "-t", strconv.Itoa(m.pid), "--net", "--mount", "--uts", "--"}
}

func (m *machine) run(args ...string) {
	m.t.Helper()
	outside(m.t, append(m.enter(), args...)...)
}

// begin starts what runs until the test ends, and returns its process.
func (m *machine) begin(args ...string) int {
	m.t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _, _ = cmd.Process.Kill(), cmd.Wait() }) // it was killed
	return cmd.Process.Pid
}

// see is a path of the machine as it is seen from here.
func (m *machine) see(path string) string { return fmt.Sprintf("/proc/%d/root%s", m.pid, path) }

// agentOn starts the agent of a machine.
func (c *cluster) agentOn(m *machine) *running {
	c.t.Helper()
	self, err := os.Executable()
	c.must(err)
	nsenter, err := exec.LookPath("nsenter")
	c.must(err)
	return c.agentBy(m.name, func(cmd *exec.Cmd) {
		cmd.Path, cmd.Args = nsenter, append(append(m.enter(), self), cmd.Args[1:]...)
	})
}

// onMachine is a volume on one of the machines.
type onMachine struct {
	c          *cluster
	m          *machine
	id         string
	cap        *csi.VolumeCapability
	attachment map[string]string
}

func (v onMachine) path(what string) string {
	return v.c.path("kubelet/" + strings.ReplaceAll(v.id, "/", "-") + "-" + what)
}

// dir is what a workload there sees, from here.
func (v onMachine) dir() string { return v.m.see(v.path("target")) }

// publishOn makes a volume usable on a machine.
func (c *cluster) publishOn(m *machine, id string, capability *csi.VolumeCapability) onMachine {
	c.t.Helper()
	v := onMachine{c: c, m: m, id: id, cap: capability}
	c.must(os.MkdirAll(m.see(v.path("staging")), 0o755))
	v.attachment = again(c.t, csi.NewControllerClient(c.at("c1")).ControllerPublishVolume, &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: m.name, VolumeCapability: v.cap}).GetPublishContext()
	n := csi.NewNodeClient(c.at(m.name))
	again(c.t, n.NodeStageVolume, &csi.NodeStageVolumeRequest{VolumeId: id, PublishContext: v.attachment, StagingTargetPath: v.path("staging"), VolumeCapability: v.cap})
	again(c.t, n.NodePublishVolume, &csi.NodePublishVolumeRequest{VolumeId: id, PublishContext: v.attachment, StagingTargetPath: v.path("staging"), TargetPath: v.path("target"), VolumeCapability: v.cap})
	return v
}

func (v onMachine) unpublish() {
	v.c.t.Helper()
	n := csi.NewNodeClient(v.c.at(v.m.name))
	again(v.c.t, n.NodeUnpublishVolume, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.path("target")})
	again(v.c.t, n.NodeUnstageVolume, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.path("staging")})
	again(v.c.t, csi.NewControllerClient(v.c.at("c1")).ControllerUnpublishVolume, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: v.m.name})
}

// entries writes counted entries to a file, each durable before the next, until it is stopped.
type entries struct {
	durable atomic.Uint64
	stop    chan struct{}
	ended   chan error
}

func startEntries(t *testing.T, path string) *entries {
	t.Helper()
	e := &entries{stop: make(chan struct{}), ended: make(chan error, 1)}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		var err error
		for n := uint64(0); err == nil; n++ {
			select {
			case <-e.stop:
				e.ended <- f.Close()
				return
			case <-time.After(20 * time.Millisecond):
			}
			if _, err = f.Write(binary.BigEndian.AppendUint64(nil, n)); err == nil {
				err = f.Sync()
			}
			if err == nil {
				e.durable.Store(n + 1)
			}
		}
		e.ended <- errors.Join(err, f.Close())
	}()
	return e
}

// goOn waits until more are durable.
func (e *entries) goOn(c *cluster) {
	c.t.Helper()
	from := e.durable.Load()
	c.wait("the writer to go on", func() bool { return e.durable.Load() >= from+3 })
}

// countEntries reads a file of entries, of which none may be missing.
func countEntries(t *testing.T, path string) uint64 {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n := uint64(len(data) / 8)
	for i := range n {
		if got := binary.BigEndian.Uint64(data[8*i:]); got != i {
			t.Fatalf("%s: entry %d is %d", path, i, got)
		}
	}
	return n
}

// appendDurably adds a line to a file.
func appendDurably(path, line string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line)
	return errors.Join(err, f.Sync(), f.Close())
}

// TestLabTwoNodesOnOneExport: two agents whose NFS clients share nothing. What one writes into a directory volume the other
// sees; a clone of a snapshot is in use on the second while its source is written on the first.
func TestLabTwoNodesOnOneExport(t *testing.T) {
	server := lab.StartNFS(t)
	outside(t, "ip", "addr", "add", ourAddress+"/32", "dev", "lo")
	t.Cleanup(func() { outside(t, "ip", "addr", "delete", ourAddress+"/32", "dev", "lo") })
	for _, c := range []struct{ engine, on string }{{"nfs3", "ext4"}, {"nfs4", "xfs"}, {"nfs4", "ext4"}} {
		t.Run(c.engine+" on "+c.on, func(t *testing.T) {
			x := server.Export(t, c.on)
			export := x.Dir
			if c.engine == "nfs4" {
				export = x.V4
			}
			twoNodes(t, fmt.Sprintf("domains:\n- {name: nas, engine: %s, params: {server: %s, export: %s, folder: k8s}}\n", c.engine, ourAddress, export), filepath.Join(x.Dir, "k8s"))
		})
	}
}

func twoNodes(t *testing.T, domains, folder string) {
	t.Cleanup(func() {
		if text, err := os.ReadFile("/proc/sys/kernel/tainted"); err != nil || string(text) != "0\n" {
			t.Errorf("the kernel is tainted (%s): its log says by what; %v", text, err)
		}
	})
	c := newClusterAt(t, ourAddress, domains)
	c.must(os.MkdirAll(c.path("kubelet"), 0o755))
	first, second := newMachine(t, 1, c.path("kubelet")), newMachine(t, 2, c.path("kubelet"))
	controller := c.controller("c1")
	c.wait("c1 to lead", func() bool { return c.ready("c1") })
	n1, n2 := c.agentOn(first), c.agentOn(second)
	defer func() {
		if t.Failed() {
			t.Logf("the controller said:\n%s\nn1 said:\n%s\nn2 said:\n%s", controller.said(), n1.said(), n2.said())
		}
	}()
	to := csi.NewControllerClient(c.at("c1"))
	create := func(name string, capability *csi.VolumeCapability, of *csi.VolumeContentSource) string {
		t.Helper()
		return again(t, to.CreateVolume, &csi.CreateVolumeRequest{Name: name, Parameters: map[string]string{"domain": "nas"}, VolumeCapabilities: []*csi.VolumeCapability{capability},
			CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20}, VolumeContentSource: of}).GetVolume().GetVolumeId()
	}
	mounted := func(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
		return &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}}, AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode}}
	}

	shared := create("shared", mounted(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER), nil)
	a := c.publishOn(first, shared, mounted(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER))
	b := c.publishOn(second, shared, mounted(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER))
	bothWrite(t, a.dir(), b.dir())

	writer := mounted(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER)
	source := create("source", writer, nil)
	v := c.publishOn(first, source, writer)
	load := startEntries(t, filepath.Join(v.dir(), "entries"))
	load.goOn(c)
	before := load.durable.Load()
	snapshot := again(t, to.CreateSnapshot, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: source}).GetSnapshot().GetSnapshotId()
	after := load.durable.Load()
	load.goOn(c)
	clone := create("clone", writer, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}})
	w := c.publishOn(second, clone, writer)
	cut := countEntries(t, filepath.Join(w.dir(), "entries"))
	if cut < before || cut > after+1 { // the last one may be on its way
		t.Errorf("the clone has %d entries; %d were durable before the cut, %d after it", cut, before, after)
	}
	c.must(appendDurably(filepath.Join(w.dir(), "own"), "of the clone\n"))
	load.goOn(c)
	if n := countEntries(t, filepath.Join(w.dir(), "entries")); n != cut {
		t.Errorf("the clone had %d entries, and has %d", cut, n)
	}
	w.unpublish()
	w = c.publishOn(second, clone, writer) // from the storage, not from the node's memory
	if n := countEntries(t, filepath.Join(w.dir(), "entries")); n != cut {
		t.Errorf("staged again, the clone has %d entries instead of %d", n, cut)
	}
	t.Logf("the cut is at entry %d, between %d and %d; the source has %d by now", cut, before, after, load.durable.Load())
	if content, err := os.ReadFile(filepath.Join(w.dir(), "own")); err != nil || string(content) != "of the clone\n" {
		t.Errorf("the clone's own file holds %q, %v", content, err)
	}
	load.goOn(c)
	close(load.stop)
	c.must(<-load.ended)
	if _, err := os.Stat(filepath.Join(v.dir(), "own")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the clone's own file is in its source as well: %v", err)
	}
	v.unpublish()
	v = c.publishOn(second, source, writer) // it moves to the other node
	if n := countEntries(t, filepath.Join(v.dir(), "entries")); n != load.durable.Load() {
		t.Errorf("on the other node the source has %d entries, %d were durable", n, load.durable.Load())
	}
	for _, p := range []onMachine{v, w, a, b} {
		p.unpublish()
	}
	for _, id := range []string{clone, source, shared} {
		again(t, to.DeleteVolume, &csi.DeleteVolumeRequest{VolumeId: id})
	}
	again(t, to.DeleteSnapshot, &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
	c.wait("the server's space to be free", func() bool {
		left, err := os.ReadDir(filepath.Join(folder, "slabs"))
		c.must(err)
		return len(left) == 0
	})
	n1.stop(t)
	n2.stop(t)
	controller.stop(t)
}

// bothWrite lets two nodes append to one file in turn, and to files of their own at the same time. Each sees at once what
// the other has made durable and closed.
func bothWrite(t *testing.T, a, b string) {
	t.Helper()
	want := ""
	for n := range 10 {
		for i, at := range []string{a, b} {
			line := fmt.Sprintf("node %d writes line %d\n", i, n)
			if err := appendDurably(filepath.Join(at, "log"), line); err != nil {
				t.Fatal(err)
			}
			want += line
			for _, reader := range []string{a, b} {
				if got, err := os.ReadFile(filepath.Join(reader, "log")); err != nil || string(got) != want {
					t.Fatalf("round %d: %s reads %d bytes of %d, %v", n, reader, len(got), len(want), err)
				}
			}
		}
		var wg sync.WaitGroup
		var failed [2]error
		for i, at := range []string{a, b} {
			wg.Go(func() {
				for k := range 5 {
					failed[i] = errors.Join(failed[i], appendDurably(filepath.Join(at, fmt.Sprint("own-", i)), fmt.Sprintf("%d.%d\n", n, k)))
				}
			})
		}
		wg.Wait()
		if err := errors.Join(failed[:]...); err != nil {
			t.Fatal(err)
		}
		for i, reader := range []string{b, a} {
			if got, err := os.ReadFile(filepath.Join(reader, fmt.Sprint("own-", i))); err != nil || strings.Count(string(got), "\n") != 5*(n+1) {
				t.Fatalf("round %d: %s has %d lines of the other node's file, not %d: %v", n, reader, strings.Count(string(got), "\n"), 5*(n+1), err)
			}
		}
	}
}
